"""One token at a time equals the whole sequence, for both state-space operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import selective_scan, selective_state_update, ssd, ssd_state_update

from .inputs import leaves, scan_inputs, ssd_inputs
from .tolerances import assert_close

LIMITS = [(0.0, float("inf")), (0.3, 0.9)]
OPERATORS = {
    "ssd": (ssd, ssd_state_update, ssd_inputs),
    "selective_scan": (selective_scan, selective_state_update, scan_inputs),
}


def at(inputs: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """Take one position of what has a length and leave out the initial state."""
    return {
        name: tensor[:, t] if name in ("x", "dt", "B", "C", "z") else tensor
        for name, tensor in inputs.items()
        if name != "initial_states"
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_steps_equal_the_whole(
    operator: str, limit: tuple[float, float], dtype: torch.dtype
) -> None:
    whole, update, draw = OPERATORS[operator]
    inputs: dict[str, Any] = draw(70, dtype=dtype)
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": limit}
    y, final = whole(**inputs, **options, return_final_states=True)
    state = inputs["initial_states"].to(final.dtype)
    before = state.clone()
    steps = []
    for t in range(70):
        y_t, new = update(state, **at(inputs, t), **options)
        assert y_t.dtype == dtype
        if t == 0:
            assert torch.equal(state, before)
        steps.append(y_t)
        state = new
    if dtype == torch.bfloat16:
        # The whole runs its products in bfloat16: an error relative to a row, not to an element.
        scale = y.float().abs().amax()
        assert (torch.stack(steps, 1).float() - y.float()).abs().amax() < 2e-2 * scale
    else:
        assert_close(torch.stack(steps, 1), y)
        assert_close(state, final)


def test_groups_and_channel_skips_are_supported() -> None:
    inputs = ssd_inputs(9, g=2)
    inputs["D"] = torch.randn(4, 3, dtype=torch.float64)
    y = ssd(**inputs, dt_softplus=True)
    state = inputs["initial_states"]
    for t in range(9):
        y_t, state = ssd_state_update(state, **at(inputs, t), dt_softplus=True)
        assert_close(y_t, y[:, t])


def test_narrow_state_stays_narrow() -> None:
    inputs = ssd_inputs(1, dtype=torch.bfloat16)
    _, state = ssd_state_update(inputs["initial_states"], **at(inputs, 0))
    assert state.dtype == torch.bfloat16


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_references_pass_gradcheck(operator: str) -> None:
    _, update, draw = OPERATORS[operator]
    inputs = draw(1)
    drawn = leaves({**at(inputs, 0), "state": inputs["initial_states"]})

    def function(*tensors: Tensor) -> Any:
        return update(**dict(zip(drawn, tensors, strict=True)), dt_softplus=True)

    assert torch.autograd.gradcheck(function, tuple(drawn.values()))


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_misuse_is_named(operator: str) -> None:
    _, update, draw = OPERATORS[operator]
    inputs = draw(1)
    with pytest.raises(ValueError, match="state has shape"):
        update(inputs["initial_states"][:, :-1], **at(inputs, 0))
    with pytest.raises(ValueError, match="no Triton kernel"):
        update(inputs["initial_states"], **at(inputs, 0), impl="triton")
