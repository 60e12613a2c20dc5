"""Products of gradients that leave the matrix unit in float32.

A sum over all tokens of a batch has more bits than its bfloat16 factors: rounding it costs
accuracy, and casting it to the float32 of the weights afterwards a pass over memory.

Letters: t tokens, m outputs, k inputs of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    elif _widens(dy_tm, total_mk.dtype):
        torch.addmm(total_mk, dy_tm.t(), x_tk, out_dtype=total_mk.dtype, out=total_mk)
    else:
        total_mk += dy_tm.t() @ x_tk


def bias_gradient(dy_tm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of dy over tokens (m,), rounded once, to ``dtype``."""
    return dy_tm.sum(dim=0, dtype=torch.promote_types(dy_tm.dtype, torch.float32)).to(dtype)
