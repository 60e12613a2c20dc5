"""Products with weights, and gradients of weights that leave the matrix unit in float32.

A sum over all tokens of a batch has more bits than its bfloat16 factors: rounding it costs
accuracy, and casting it to the float32 of the weights afterwards a pass over memory.

Letters: t tokens, m outputs, k inputs of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.copies import in_dtype


def _widens(factor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether products of such factors can leave the matrix unit in ``dtype``."""
    half = factor.dtype in (torch.bfloat16, torch.float16)
    return factor.is_cuda and torch.version.hip is None and half and dtype == torch.float32


def matrix_gradient(dy_tm: Tensor, x_tk: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dyᵀ x (m, k), rounded once, to ``dtype``."""
    if _widens(dy_tm, dtype):
        return torch.mm(dy_tm.t(), x_tk, out_dtype=dtype)
    return (dy_tm.t() @ x_tk).to(dtype)


def add_matrix_gradient(total_mk: Tensor, dy_tm: Tensor, x_tk: Tensor) -> None:
    """Add dyᵀ x to a float32 matrix, in place and on NVIDIA's GPUs unrounded."""
    if dy_tm.dtype == total_mk.dtype:
        total_mk.addmm_(dy_tm.t(), x_tk)
    elif _widens(dy_tm, total_mk.dtype) and not torch.compiler.is_compiling():
        torch.addmm(total_mk, dy_tm.t(), x_tk, out_dtype=total_mk.dtype, out=total_mk)
    else:  # torch 2.11 cannot trace addmm with out_dtype
        total_mk += matrix_gradient(dy_tm, x_tk, total_mk.dtype)


def bias_gradient(dy_tm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of dy over tokens (m,), rounded once, to ``dtype``."""
    return dy_tm.sum(dim=0, dtype=torch.promote_types(dy_tm.dtype, torch.float32)).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight_mk: Tensor, bias_m: Tensor | None
    ) -> Tensor:
        cast_mk = in_dtype(weight_mk, x.dtype)
        ctx.save_for_backward(x, cast_mk)
        ctx.dtypes = weight_mk.dtype, None if bias_m is None else bias_m.dtype
        return torch.nn.functional.linear(
            x, cast_mk, None if bias_m is None else bias_m.to(x.dtype)
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, cast_mk = ctx.saved_tensors
        dy_tm, x_tk = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        wanted, (weight_dtype, bias_dtype) = ctx.needs_input_grad, ctx.dtypes
        dx = (dy_tm @ cast_mk).view(x.shape) if wanted[0] else None
        dweight_mk = matrix_gradient(dy_tm, x_tk, weight_dtype) if wanted[1] else None
        dbias_m = bias_gradient(dy_tm, bias_dtype) if wanted[2] else None
        return dx, dweight_mk, dbias_m


def linear(x: Tensor, weight_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b in the dtype of x, whatever those of W and b.

    What autocast does, less its cast of a weight of which a copy is kept (``ops.copies``) and its
    rounding of the weight's gradient.

    Args:
        x: (…, k).
        weight_mk: Of any float dtype.
        bias_m: Or None.

    Returns:
        (…, m). Differentiable once in every argument.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(x, weight_mk, bias_m)
