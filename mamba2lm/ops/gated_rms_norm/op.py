"""The public normalisations. Letters: d channels; leading axes are free."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape
from mamba2lm.ops.gated_rms_norm.cpu import rms_norm_cpu
from mamba2lm.ops.gated_rms_norm.launch import rms_norm_triton, unsupported
from mamba2lm.ops.gated_rms_norm.reference import (
    gated_rms_norm_reference,
    rms_norm_reference,
    rms_norm_residual_reference,
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Divide by the root mean square over the last axis and scale.

    Args:
        x: Inputs, (…, d).
        weight: Scale, (d,).
        eps: Added to the mean square.
        out_dtype: Of the result: a float32 residual stream enters bfloat16 layers in one pass.
            None means the dtype of x.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in ``out_dtype``; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: ``weight`` does not fit ``x``, or an implementation that does not exist.
    """
    d = x.shape[-1]
    chosen = choose_impl("rms_norm", impl, x, cpu=True, unsupported=unsupported(x, d))
    expect_shape("weight", weight, "d", {"d": d})
    if chosen == "triton":
        return rms_norm_triton(x, weight, eps, dtype=out_dtype)[0]
    if chosen == "cpu":
        return rms_norm_cpu(x, None, weight, eps, d, out_dtype)
    return rms_norm_reference(x, weight, eps, out_dtype)


def rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum, in one pass.

    Args:
        x: What a layer adds, (…, d).
        residual: The residual stream, same shape; float32 where x is narrower, or the same dtype.
        weight: Scale, (d,).
        eps: Added to the mean square.
        out_dtype: Of the normalised sum; None means the dtype of x.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        RMSNorm(x + residual) (…, d) in ``out_dtype``, and x + residual in the dtype of
        ``residual``; added and computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, or an implementation that does not exist.
    """
    d = x.shape[-1]
    chosen = choose_impl("rms_norm_residual", impl, x, cpu=True, unsupported=unsupported(x, d))
    expect_shape("weight", weight, "d", {"d": d})
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}."
        )
    if chosen == "triton":
        return rms_norm_triton(x, weight, eps, residual=residual, dtype=out_dtype)
    if chosen == "cpu":
        total = (x + residual).to(residual.dtype)
        return rms_norm_cpu(total, None, weight, eps, d, out_dtype or x.dtype), total
    return rms_norm_residual_reference(x, residual, weight, eps, out_dtype)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Gate with silu(z), then normalise within groups of channels.

    Args:
        x: Inputs, (…, d).
        z: Gate, same shape.
        weight: Scale, (d,).
        eps: Added to the mean square.
        group_size: Channels per group, dividing d; None means all d.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in the dtype of x; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, a group size that does not divide d, or an
            implementation that does not exist.
    """
    d = x.shape[-1]
    expect_shape("weight", weight, "d", {"d": d})
    if z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected that of x, {tuple(x.shape)}.")
    group_size = d if group_size is None else group_size
    if group_size < 1 or d % group_size:
        raise ValueError(f"group_size={group_size} must divide the {d} channels of x.")
    reason = unsupported(x, group_size)
    chosen = choose_impl("gated_rms_norm", impl, x, cpu=True, unsupported=reason)
    if chosen == "triton":
        return rms_norm_triton(x, weight, eps, z=z, group_size=group_size)[0]
    if chosen == "cpu":
        return rms_norm_cpu(x, z, weight, eps, group_size)
    return gated_rms_norm_reference(x, z, weight, eps, group_size)
