"""Prompts read together in few shapes: each as if it were alone."""

from __future__ import annotations

import pytest
import torch

from mamba2lm.inference.rows import Read
from mamba2lm.inference.whole_prompts import WholePrompts
from tests.inference import helpers
from tests.inference.test_engine import random_ids


def test_shapes_are_few_and_hold_what_they_are_for() -> None:
    whole = WholePrompts(helpers.model("MM"), most=512, record=False)
    assert sorted(whole.shapes) == [
        (1, 64), (1, 128), (1, 256), (1, 512), (2, 64), (2, 128), (2, 256), (4, 64), (4, 128),
        (8, 64),
    ]  # fmt: skip
    assert whole.shape(1, 1) == (1, 64)
    assert whole.shape(3, 65) == (4, 128)
    assert whole.shape(8, 64) == (8, 64)
    assert whole.shape(9, 10) is None
    assert whole.shape(1, 513) is None
    assert whole.shape(4, 200) is None
    assert WholePrompts(helpers.model("MM"), most=63, record=False).shapes == []


@pytest.mark.parametrize("pattern", ["MM", "MSF"])
def test_prompts_are_read_as_if_alone(pattern: str) -> None:
    built = helpers.model(pattern, dtype=torch.float64)
    whole = WholePrompts(built, most=512, record=False)
    kept = []
    # The second group overwrites where the first was read.
    for lengths in ([5, 64, 33], [100, 70, 128, 99], [1]):
        prompts = random_ids(*lengths)
        states, logits_bv = whole.read(prompts)
        kept += [(ids, Read(states, i), logits_bv[i]) for i, ids in enumerate(prompts)]
    for ids, read, logits_v in kept:
        with torch.inference_mode():
            alone = built(torch.tensor([ids]), state=built.new_state(1))
            following = [
                built(torch.tensor([[7, 8, 9]]), state=state).logits
                for state in (read.alone(), alone.state)
            ]
        assert torch.allclose(logits_v, alone.logits[0, -1], atol=1e-10)
        assert torch.allclose(*following, atol=1e-10)
