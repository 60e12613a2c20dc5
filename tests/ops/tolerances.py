"""How close two computations of one function must be, per dtype of the inputs."""

from __future__ import annotations

from typing import Any

import torch

FORWARD: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}

# Gradients sum more terms than outputs.
BACKWARD: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 2e-4, "atol": 2e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}

# A bfloat16 result may be this much further from float64 than a plain bfloat16 computation is.
NAIVE_ERROR_RATIO = 1.2


def assert_close(actual: Any, expected: Any, *, gradient: bool = False, what: str = "") -> None:
    """Compare tensors, or sequences of them, with the tolerance of the first one's dtype."""
    first = actual if isinstance(actual, torch.Tensor) else actual[0]
    table = BACKWARD if gradient else FORWARD
    torch.testing.assert_close(
        actual, expected, **table[first.dtype], msg=lambda text: f"{what}: {text}"
    )


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square error over the root mean square of the exact values."""
    exact = exact.double()
    return ((actual.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
