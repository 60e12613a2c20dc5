"""RMS normalisation over the last axis, or over groups of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops.dispatch import state_dtype


def rms_norm_reference(
    x: Tensor, weight_d: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight, computed in float32, in ``out_dtype`` or x's.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.
    """
    dtype = state_dtype(x)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight_d.to(dtype)).to(out_dtype or x.dtype)


def rms_norm_residual_reference(
    x: Tensor,
    residual: Tensor,
    weight_d: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return RMSNorm(x + residual) in ``out_dtype`` or x's, and the sum in the residual's dtype."""
    total = (x.to(state_dtype(x)) + residual).to(residual.dtype)
    return rms_norm_reference(total, weight_d, eps, out_dtype or x.dtype), total


def gated_rms_norm_reference(
    x: Tensor, z: Tensor, weight_d: Tensor, eps: float, group_size: int
) -> Tensor:
    """Return RMSNorm(x silu(z)) over groups of ``group_size`` channels, in the dtype of x.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 7.1 (the norm before the output projection,
    in groups for tensor parallelism: section 8.1).
    """
    dtype = state_dtype(x)
    gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + eps)
    return ((gated * scale).flatten(-2) * weight_d.to(dtype)).to(x.dtype)
