"""The public normalisations. Letters: d channels; leading axes are free."""

from __future__ import annotations

from torch import Tensor

from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape
from mamba2lm.ops.gated_rms_norm.cpu import rms_norm_cpu
from mamba2lm.ops.gated_rms_norm.reference import gated_rms_norm_reference, rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, impl: Impl = "auto") -> Tensor:
    """Divide by the root mean square over the last axis and scale.

    Args:
        x: Inputs, (…, d).
        weight: Scale, (d,).
        eps: Added to the mean square.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in the dtype of x; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: ``weight`` does not fit ``x``, or an implementation that does not exist.
    """
    chosen = choose_impl("rms_norm", impl, x, cpu=True)
    expect_shape("weight", weight, "d", {"d": x.shape[-1]})
    if chosen == "cpu":
        return rms_norm_cpu(x, None, weight, eps, x.shape[-1])
    return rms_norm_reference(x, weight, eps)


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
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in the dtype of x; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, a group size that does not divide d, or an
            implementation that does not exist.
    """
    chosen = choose_impl("gated_rms_norm", impl, x, cpu=True)
    d = x.shape[-1]
    expect_shape("weight", weight, "d", {"d": d})
    if z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected that of x, {tuple(x.shape)}.")
    group_size = d if group_size is None else group_size
    if group_size < 1 or d % group_size:
        raise ValueError(f"group_size={group_size} must divide the {d} channels of x.")
    if chosen == "cpu":
        return rms_norm_cpu(x, z, weight, eps, group_size)
    return gated_rms_norm_reference(x, z, weight, eps, group_size)
