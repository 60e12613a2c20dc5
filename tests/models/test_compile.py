"""Blocks through torch.compile, as training.compile has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mamba2lm.models import LanguageModel
from mamba2lm.models.language_model import Block
from mamba2lm.training.parallelize import compile_blocks
from tests.training.helpers import tiny_model


def loss_and_gradients(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    assert loss is not None
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


# On a CPU Mamba-1's scan is a loop over time, which stays outside the graph.
@pytest.mark.parametrize(
    ("pattern", "whole"),
    [pytest.param("M", True, marks=pytest.mark.slow), ("AF", True), ("S", False)],
)
def test_compiled_blocks_compute_the_same(pattern: str, whole: bool) -> None:
    model = tiny_model(pattern)
    assert_compiled_is_the_same(model, list(model.blocks), whole=whole)


def test_a_whole_compiled_model_computes_the_same() -> None:
    model = tiny_model("AF")
    assert_compiled_is_the_same(model, [model], whole=True)


def assert_compiled_is_the_same(
    model: LanguageModel, parts: list[nn.Module], *, whole: bool
) -> None:
    ids = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = loss_and_gradients(model, ids)
    try:
        for part in parts:
            part.compile(backend="aot_eager", fullgraph=whole)
        found = loss_and_gradients(model, ids)
    finally:
        torch._dynamo.reset()
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_on_a_gpu_mixers_of_one_node_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[str] = set()
    monkeypatch.setattr(Block, "compile", lambda block: compiled.add(block.mixer.type_name))
    model = tiny_model("MSAF")
    compile_blocks(model, torch.device("cuda"))
    assert compiled == {"attention", "mlp"}
    compile_blocks(model, torch.device("cpu"))
    assert compiled == {"mamba2", "mamba1", "attention", "mlp"}
