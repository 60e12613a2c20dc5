"""What the benchmark of training steps computes from what a GPU's profiler tells."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import Interval, Subject, gaps, group_of, longest_gaps, step_function
from mamba2lm.models import LanguageModel
from mamba2lm.training.graph import WARM_UP, StepGraphs
from mamba2lm.training.optimizer import AdamWImpl
from tests.training.helpers import tiny_model
from tests.training.recording import StandIn


def test_gaps_are_when_nothing_runs() -> None:
    run = [
        Interval(10.0, 20.0, "a"),
        Interval(12.0, 15.0, "inside"),
        Interval(20.0, 21.0, "b"),
        Interval(24.0, 30.0, "c"),
        Interval(0.0, 4.0, "first"),
        Interval(31.0, 32.0, "c"),
    ]
    assert gaps(run) == [(6.0, "first", "a"), (3.0, "b", "c"), (1.0, "c", "c")]
    assert gaps([]) == []
    summed = longest_gaps([(6.0, "x", "y"), (2.0, "x", "y"), (9.0, "y", "x")], steps=2)
    assert summed == {"y | x": [0.0045, 0.5], "x | y": [0.004, 1.0]}
    assert longest_gaps(gaps(run), 1, most=1) == {"first | a": [0.006, 1.0]}


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("adamw_kernel", "optimizer"),
        ("void multi_tensor_apply_kernel<LpNormFunctor>", "optimizer"),
        ("convolve_backward_kernel", "conv"),
        ("rms_norm_kernel", "norm"),
        ("nvjet_sm90_tst_256x128", "matmul"),
        ("through_states_kernel", "ssd"),
        ("vectorized_elementwise_kernel", "elementwise, copies and the rest"),
    ],
)
def test_kernels_are_told_apart(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_a_timed_step_trains_the_model_replayed_or_not() -> None:
    found = []
    for replayed in (False, True):
        model: LanguageModel = tiny_model("MF")
        subject = Subject(model, lambda i, s, m=model: m(i[:, :-1], i[:, 1:], seq_idx=s).loss, 1.0)
        ids = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
        seq_idx = torch.arange(16).div(6, rounding_mode="floor").expand(2, -1)
        stand_in = StandIn(model.parameters())
        graphs = StepGraphs(model.parameters(), ids.device, stand_in) if replayed else None
        step = step_function(subject, ids, seq_idx, rate=1e-2, adamw=AdamWImpl.auto, graphs=graphs)
        losses = [step() for _ in range(6)]
        assert losses[-1] < losses[0] - 0.5
        assert all(parameter.grad is None for parameter in model.parameters())
        assert stand_in.replayed == (6 - WARM_UP if replayed else 0)
        found.append(losses)
    assert found[0] == found[1]
