"""Muon (Jordan 2024), for whole matrices and for those of which every process has a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: they raise small singular values fastest."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Step along the orthogonal factor of a matrix's momentum, with decoupled weight decay.

    Moments are stored as the parameter is. A divided one is gathered in the dtype of the iteration,
    and every process iterates on the whole; it does not matter in which order rows and columns of
    divided segments come, as U Vᵀ follows any permutation of them.

    Source: Liu et al. 2025 (arXiv:2502.16982), §2.2, for the update's scale.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        """Take matrices to update.

        Args:
            params: Matrices, or groups of them as torch's optimizers take.
            lr: Learning rate in AdamW's terms: the update's root mean square is 0.2 times that.
            weight_decay: Fraction of the weight, times the rate, that each step takes off.
            momentum: Of the gradient's running mean; Nesterov's look ahead uses it again.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        assert closure is None, "losses are computed once a step"
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad, self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                ahead = gradient.lerp(state["momentum_buffer"], momentum)
                update = orthogonal_factor(ahead)
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * scale)


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return about U Vᵀ of a matrix U S Vᵀ, divided as the matrix is.

    Singular values end between 0.7 and 1.2. Computed in bfloat16 (float64 for float64).
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.bfloat16
    x = matrix.to(dtype)
    if not isinstance(x, DTensor):
        return _iterate(x)
    mesh, placements = x.device_mesh, x.placements
    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(_iterate(x.full_tensor()), mesh, everywhere, run_check=False)
    return whole.redistribute(placements=placements)


def _iterate(x: Tensor) -> Tensor:
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.t()
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.t() if tall else x
