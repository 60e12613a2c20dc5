"""Blocks through torch.compile, as training.compile has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba2lm.models import LanguageModel
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
    ids = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = loss_and_gradients(model, ids)
    try:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=whole)
        found = loss_and_gradients(model, ids)
    finally:
        torch._dynamo.reset()
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
