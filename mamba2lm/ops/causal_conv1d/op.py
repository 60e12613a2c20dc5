"""The public causal convolution and its one-token update.

Letters: b batch, l length, d channels, w conv width; the state is the last w-1 inputs.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops.causal_conv1d.cpu import causal_conv1d_cpu
from mamba2lm.ops.causal_conv1d.launch import causal_conv1d_triton, unsupported
from mamba2lm.ops.causal_conv1d.launch_step import convolve_step, step_unsupported
from mamba2lm.ops.causal_conv1d.reference import causal_conv1d_taps, last_inputs
from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape
from mamba2lm.ops.documents import document_ordinals


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel causally with its own few taps.

    Args:
        x: Inputs, (b, l, d), l ≥ 1.
        weight: Taps, oldest first, (d, w).
        bias: Bias, (d,), or None.
        activation: ``"silu"`` or None.
        initial_states: The w-1 inputs before position 0, oldest first, (b, w-1, d); None means
            zeros. They belong to the document at position 0.
        seq_idx: Document ids, (b, l); a tap that would reach another document reads zero.
        return_final_states: Whether to return the last w-1 inputs too.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        y (b, l, d) in the dtype of x; with ``return_final_states`` also the last w-1 inputs
        (b, w-1, d), zero where they belong to an earlier document than the last position.

    Raises:
        ValueError: A tensor of the wrong shape, an unknown activation or implementation.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b l d", sizes)
    _check_filter(weight, bias, activation, sizes)
    if initial_states is not None:
        expect_shape("initial_states", initial_states, "b w-1 d", sizes)
    if seq_idx is not None:
        expect_shape("seq_idx", seq_idx, "b l", sizes)
    if sizes["l"] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; the length (axis 1) must be at least 1.")
    reason = unsupported(x, weight)
    chosen = choose_impl("causal_conv1d", impl, x, cpu=True, unsupported=reason)
    if chosen == "triton":
        y_bld, final_bwd = causal_conv1d_triton(
            x,
            weight,
            bias,
            silu=activation == "silu",
            initial_states=initial_states,
            seq_idx=seq_idx,
            return_final_states=return_final_states,
        )
        return (y_bld, final_bwd) if return_final_states else y_bld
    document_bl = None if seq_idx is None else document_ordinals(seq_idx)
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "cpu":
            y_bld = causal_conv1d_cpu(
                x,
                weight,
                bias,
                silu=activation == "silu",
                initial_states_bwd=initial_states,
                document_bl=document_bl,
            )
        else:
            y_bld = causal_conv1d_taps(
                x, weight, bias, initial_states_bwd=initial_states, document_bl=document_bl
            )
            y_bld = F.silu(y_bld) if activation == "silu" else y_bld
        if not return_final_states:
            return y_bld
        return y_bld, last_inputs(x, sizes["w-1"], initial_states, document_bl)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    in_place: bool = False,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve one new token with the inputs before it.

    Args:
        x: The new input, (b, d).
        state: The w-1 inputs before it, oldest first, (b, w-1, d).
        weight: Taps, oldest first, (d, w).
        bias: Bias, (d,), or None.
        activation: ``"silu"`` or None.
        in_place: Overwrite ``state``, which is then what is returned.
        out: Where to write y, (b, d); may be ``x`` itself. None allocates it.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        y (b, d) in the dtype of x and the new state (b, w-1, d) in the dtype of ``state``, which
        is left as it was unless ``in_place``.

    Raises:
        ValueError: A tensor of the wrong shape, an unknown activation or implementation.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b d", sizes)
    _check_filter(weight, bias, activation, sizes)
    expect_shape("state", state, "b w-1 d", sizes)
    if out is not None:
        expect_shape("out", out, "b d", sizes)
    reason = step_unsupported(x, state, weight, bias)
    if choose_impl("causal_conv1d_update", impl, x, unsupported=reason) == "triton":
        return convolve_step(x, state, weight, bias, activation == "silu", in_place, out)
    window_bwd = torch.cat([state.to(x.dtype), x.unsqueeze(1)], dim=1)
    y_bd = (window_bwd * weight.to(x.dtype).t()).sum(dim=1)
    if bias is not None:
        y_bd = y_bd + bias.to(x.dtype)
    if activation == "silu":
        y_bd = F.silu(y_bd)
    new_bwd = window_bwd[:, 1:]
    return (
        y_bd if out is None else out.copy_(y_bd),
        state.copy_(new_bwd) if in_place else new_bwd.to(state.dtype),
    )


def _check_filter(
    weight: Tensor, bias: Tensor | None, activation: str | None, sizes: dict[str, int]
) -> None:
    expect_shape("weight", weight, "d w", sizes)
    if sizes["w"] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it needs at least one tap.")
    sizes["w-1"] = sizes["w"] - 1
    if bias is not None:
        expect_shape("bias", bias, "d", sizes)
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} is unknown; use None or 'silu'.")
