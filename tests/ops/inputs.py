"""Random operator inputs, seeded, with every optional argument present."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = (1, 2, 63, 64, 65, 100)


def seq_idx(b: int, length: int, *, seed: int = 0) -> Tensor:
    """Draw document ids with many short documents, ids that come back, and one long tail."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, length, generator=generator) < 0.12
    starts[:, length // 2 :] = False
    if length > 2:
        starts[0, 1] = True
    return starts.long().cumsum(1) % 3


def ssd_inputs(
    length: int,
    *,
    b: int = 2,
    h: int = 4,
    p: int = 3,
    g: int = 1,
    n: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw arguments of ``ssd``, all tensors by argument name."""
    torch.manual_seed(seed)
    shapes = {
        "x": (b, length, h, p),
        "dt": (b, length, h),
        "B": (b, length, g, n),
        "C": (b, length, g, n),
        "D": (h,),
        "z": (b, length, h, p),
        "dt_bias": (h,),
        "initial_states": (b, h, p, n),
    }
    drawn = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["A"] = -0.2 - 2.0 * torch.rand(h, dtype=torch.float64)
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def scan_inputs(
    length: int,
    *,
    b: int = 2,
    d: int = 4,
    n: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw arguments of ``selective_scan``, all tensors by argument name."""
    torch.manual_seed(seed)
    shapes = {
        "x": (b, length, d),
        "dt": (b, length, d),
        "B": (b, length, n),
        "C": (b, length, n),
        "D": (d,),
        "z": (b, length, d),
        "dt_bias": (d,),
        "initial_states": (b, d, n),
    }
    drawn = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["A"] = -0.2 - 2.0 * torch.rand(d, n, dtype=torch.float64)
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors as leaves that require gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def gradients(
    outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], *, seed: int = 1
) -> list[Tensor]:
    """Return gradients of a random weighting of all outputs with respect to all inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        for output in outputs
    ]
    return list(torch.autograd.grad(outputs, list(inputs.values()), weights))
