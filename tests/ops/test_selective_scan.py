"""The Mamba-1 scan: every schedule of it is one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import selective_scan
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.selective_scan import cpu as cpu_module
from mamba2lm.ops.selective_scan import reference as reference_module
from mamba2lm.ops.selective_scan.cpu import selective_scan_cpu
from mamba2lm.ops.selective_scan.reference import (
    associative_scan,
    combine,
    selective_scan_blocked,
    selective_scan_parallel,
    selective_scan_sequential,
)

from .inputs import LENGTHS, gradients, leaves, scan_inputs, seq_idx
from .tolerances import NAIVE_ERROR_RATIO, assert_close, relative_error

SCHEDULES: dict[str, Callable[..., Any]] = {
    "sequential": selective_scan_sequential,
    "parallel": selective_scan_parallel,
    "cpu": selective_scan_cpu,
    "blocks, sequential": partial(selective_scan_blocked, chunk_size=16),
    "blocks, parallel": partial(selective_scan_blocked, chunk_size=16, parallel=True),
}


def run(schedule: Callable[..., Any], inputs: dict[str, Tensor], document: Tensor | None) -> Any:
    return schedule(
        inputs["x"],
        inputs["dt"],
        inputs["A"],
        inputs["B"],
        inputs["C"],
        initial_states_bdn=inputs["initial_states"],
        document_bl=document,
    )


def processed(length: int, **kwargs: Any) -> dict[str, Tensor]:
    drawn = scan_inputs(length, **kwargs)
    drawn["dt"] = torch.nn.functional.softplus(drawn["dt"])
    return {name: drawn[name] for name in ("x", "dt", "A", "B", "C", "initial_states")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_schedules_are_one_function(
    length: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_module, "BLOCK_ELEMENTS", 2 * 4 * 3 * 10)
    document = document_ordinals(seq_idx(2, length)) if packed else None
    results = {}
    for name, schedule in SCHEDULES.items():
        inputs = leaves(processed(length))
        outputs = run(schedule, inputs, document)
        results[name] = (outputs, gradients(outputs, inputs))
    for name, (outputs, grads) in results.items():
        assert_close(outputs, results["sequential"][0], what=name)
        assert_close(grads, results["sequential"][1], gradient=True, what=name)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize(
    ("decay", "inputs", "outputs"),
    [
        (0.9, (1, 2, 3, 4), (1, 2.9, 5.61, 9.049)),
        (2.0, (1, 3, 5, 7), (1, 5, 15, 37)),
    ],
)
def test_worked_cases(
    schedule: str, decay: float, inputs: tuple[int, ...], outputs: tuple[float, ...]
) -> None:
    x = torch.tensor(inputs, dtype=torch.float64).view(1, 4, 1)
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    A = torch.tensor([[decay]], dtype=torch.float64).log()
    y, state = SCHEDULES[schedule](x, ones, A, ones, ones)
    assert_close(y.flatten(), torch.tensor(outputs, dtype=torch.float64))
    assert_close(state.flatten(), torch.tensor(outputs[-1:], dtype=torch.float64))


def test_composition_is_associative_and_not_commutative() -> None:
    torch.manual_seed(0)
    steps = [(torch.randn(3).double(), torch.randn(3).double()) for _ in range(3)]
    left = combine(combine(steps[0], steps[1]), steps[2])
    right = combine(steps[0], combine(steps[1], steps[2]))
    assert_close(left, right)
    swapped = combine(combine(steps[1], steps[0]), steps[2])
    assert not torch.allclose(left[1], swapped[1])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 31, 100])
def test_scan_composes_prefixes_in_linear_work(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = 0

    def counted(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> Any:
        nonlocal work
        work += earlier[0].shape[1]
        return combine(earlier, later)

    monkeypatch.setattr(reference_module, "combine", counted)
    torch.manual_seed(0)
    a, u = torch.rand(2, length, 3).double(), torch.randn(2, length, 3).double()
    prefix_a, prefix_u = associative_scan(a, u)
    if length > 1:
        assert length - 1 <= work <= 2 * length
    state = torch.zeros(2, 3).double()
    for t in range(length):
        state = a[:, t] * state + u[:, t]
        assert_close(prefix_u[:, t], state)
        assert_close(prefix_a[:, t], a[:, : t + 1].prod(1))


def full_call(inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, dt_softplus=True, return_final_states=True, **kwargs)


@pytest.mark.parametrize("packed", [False, True])
def test_reference_passes_gradcheck(packed: bool) -> None:
    drawn = scan_inputs(7, b=1, d=2, n=2)
    ids = seq_idx(1, 7) if packed else None

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return full_call(dict(zip(drawn, tensors, strict=True)), seq_idx=ids, chunk_size=3)

    assert torch.autograd.gradcheck(function, tuple(leaves(drawn).values()))


@pytest.mark.parametrize("schedule", ["sequential", "parallel", "cpu"])
def test_schedules_pass_gradcheck(schedule: str) -> None:
    drawn = leaves(processed(6, b=1, d=2, n=2))
    document = document_ordinals(torch.tensor([[0, 0, 1, 1, 1, 0]]))

    def function(*tensors: Tensor) -> Any:
        return run(SCHEDULES[schedule], dict(zip(drawn, tensors, strict=True)), document)

    assert torch.autograd.gradcheck(function, tuple(drawn.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_matches_float64(dtype: torch.dtype) -> None:
    narrow = {k: v.to(dtype) for k, v in scan_inputs(100, d=8, n=4).items()}
    ids = seq_idx(2, 100)
    inputs = leaves(narrow)
    outputs = full_call(inputs, seq_idx=ids)
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32
    exact = leaves({k: v.double() for k, v in narrow.items()})
    expected = full_call(exact, seq_idx=ids, impl="reference")
    eps = torch.finfo(dtype).eps
    assert relative_error(outputs[0], expected[0]) < 4 * eps
    for got, wanted in zip(gradients(outputs, inputs), gradients(expected, exact), strict=True):
        assert relative_error(got, wanted) < 8 * eps


def test_bfloat16_error_is_that_of_plain_bfloat16() -> None:
    narrow = {k: v.bfloat16() for k, v in scan_inputs(60, d=8, n=4).items()}
    truth, _ = full_call({k: v.double() for k, v in narrow.items()}, impl="reference")
    delta = torch.nn.functional.softplus(narrow["dt"] + narrow["dt_bias"])
    state, outputs = narrow["initial_states"], []
    for t in range(60):
        a = (delta[:, t, :, None] * narrow["A"]).exp()
        u = (delta[:, t] * narrow["x"][:, t]).unsqueeze(-1) * narrow["B"][:, t].unsqueeze(1)
        state = a * state + u
        outputs.append((state * narrow["C"][:, t].unsqueeze(1)).sum(-1))
    naive = (torch.stack(outputs, 1) + narrow["D"] * narrow["x"]) * torch.nn.functional.silu(
        narrow["z"]
    )
    ours, _ = full_call(narrow)
    assert relative_error(ours, truth) <= NAIVE_ERROR_RATIO * relative_error(naive, truth)


def test_documents_in_a_row_equal_documents_alone() -> None:
    inputs = scan_inputs(100, b=1, dtype=torch.float32)
    ids = torch.tensor([0] * 30 + [1] * 3 + [0] * 31 + [2] * 36).unsqueeze(0)
    y, final = full_call(inputs, seq_idx=ids)
    for start, stop in ((0, 30), (30, 33), (33, 64), (64, 100)):
        alone = {
            k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()
        }
        if start:
            alone["initial_states"] = torch.zeros_like(alone["initial_states"])
        y_alone, final_alone = full_call(alone)
        assert_close(y[:, start:stop], y_alone, what=f"document at {start}")
    assert_close(final, final_alone)


@pytest.mark.parametrize("split", [1, 37, 64, 99])
def test_continuing_equals_the_whole(split: int) -> None:
    inputs = scan_inputs(100, dtype=torch.float32)
    whole, final = full_call(inputs)
    state, parts = inputs["initial_states"], []
    for start, stop in ((0, split), (split, 100)):
        part = {
            k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()
        }
        y, state = full_call({**part, "initial_states": state})
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_extreme_decays_stay_finite_and_right() -> None:
    torch.manual_seed(0)
    inputs = {k: v for k, v in scan_inputs(90, dtype=torch.float32).items() if k != "dt_bias"}
    inputs["dt"] = (10.0 ** (torch.rand(2, 90, 4) * 7.9 - 6)).clamp(max=80.0)
    inputs["A"] = -torch.ones(4, 3)
    exact = leaves({k: v.double() for k, v in inputs.items()})
    ours = leaves(inputs)
    expected = selective_scan(**exact, return_final_states=True, impl="reference")
    actual = selective_scan(**ours, return_final_states=True)
    pairs = [*zip(actual, expected, strict=True)]
    pairs += [*zip(gradients(actual, ours), gradients(expected, exact), strict=True)]
    for got, wanted in pairs:
        assert torch.isfinite(got).all()
        assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"A": torch.randn(5, 3)}, r"A has shape \(5, 3\); expected \(d=4, n\)"),
        ({"z": torch.randn(2, 8, 3)}, "z has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_misuse_is_named(change: dict[str, Any], text: str) -> None:
    inputs: dict[str, Any] = scan_inputs(8)
    with pytest.raises(ValueError, match=text):
        selective_scan(**{**inputs, **change})
