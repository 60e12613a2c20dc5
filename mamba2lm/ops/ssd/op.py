"""The public SSD operator.

Letters: b batch, l length, h heads, p head dim, g groups, n state.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mamba2lm.ops.discretisation import NO_LIMIT, step_sizes
from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape, state_dtype
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.skip_and_gate import skip_and_gate
from mamba2lm.ops.ssd.cpu import ssd_chunked_cpu
from mamba2lm.ops.ssd.launch import reason_against, ssd_triton, unsupported
from mamba2lm.ops.ssd.reference import ssd_chunked


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: Literal[False] = False,
    chunk_size: int = 64,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: Literal[True],
    chunk_size: int = 64,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    chunk_size: int = 64,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply the state-space-duality map of Mamba-2.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ and y_t = h_t C_t + D x_t, times silu(z_t), with
    Δ = clamp(softplus(dt + dt_bias)). Matrix products run in the dtype of ``x`` (autocast is
    switched off inside), everything else in float32 (float64 for float64 inputs).

    Args:
        x: Inputs, (b, l, h, p), l ≥ 1.
        dt: Raw step sizes, (b, l, h).
        A: Negative decay rates, (h,).
        B: Input maps, (b, l, g, n) with h divisible by g.
        C: Output maps, (b, l, g, n).
        D: Skip weights, (h,) or (h, p).
        z: Gate, (b, l, h, p).
        dt_bias: Bias of the step sizes, (h,).
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Smallest and largest step size Δ.
        initial_states: State before position 0, (b, h, p, n); it belongs to the document at
            position 0. None means zero.
        seq_idx: Document ids, (b, l); the state restarts from zero wherever the id changes.
        return_final_states: Whether to return the state after the last position too.
        chunk_size: Positions per chunk of the chunked algorithm; changes speed, not the result.
            The Triton kernels choose their own.
        impl: ``"auto"`` (on a GPU the kernels where they apply and are faster), ``"triton"`` or
            ``"reference"``.

    Returns:
        y (b, l, h, p) in the dtype of x; with ``return_final_states`` also the final states
        (b, h, p, n) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: A tensor of the wrong shape, an impossible ``chunk_size`` or ``dt_limit``, or
            an implementation that does not exist.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 6 and listing 1.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b l h p", sizes)
    expect_shape("dt", dt, "b l h", sizes)
    expect_shape("A", A, "h", sizes)
    expect_shape("B", B, "b l g n", sizes)
    expect_shape("C", C, "b l g n", sizes)
    if D is not None:
        expect_shape("D", D, "h" if D.ndim == 1 else "h p", sizes)
    if z is not None:
        expect_shape("z", z, "b l h p", sizes)
    if dt_bias is not None:
        expect_shape("dt_bias", dt_bias, "h", sizes)
    if initial_states is not None:
        expect_shape("initial_states", initial_states, "b h p n", sizes)
    if seq_idx is not None:
        expect_shape("seq_idx", seq_idx, "b l", sizes)
    if sizes["l"] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; the length (axis 1) must be at least 1.")
    if sizes["h"] % sizes["g"]:
        raise ValueError(
            f"B has {sizes['g']} groups (axis 2), which do not divide the {sizes['h']} heads of x."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")

    reason = reason_against(x, B) if impl == "auto" else unsupported(x, B)
    chosen = choose_impl("ssd", impl, x, cpu=True, unsupported=reason)
    if chosen == "triton":
        skip_outside = D is not None and D.ndim == 2
        with torch.autocast(x.device.type, enabled=False):
            y_blhp, state_bhpn = ssd_triton(
                x,
                dt,
                A,
                B,
                C,
                D=None if skip_outside else D,
                z=None if skip_outside else z,
                dt_bias=dt_bias,
                dt_softplus=dt_softplus,
                dt_limit=dt_limit,
                initial_states=initial_states,
                document=None if seq_idx is None else document_ordinals(seq_idx),
            )
            if skip_outside:
                y_blhp = skip_and_gate(y_blhp, x, D, z)
        return (y_blhp, state_bhpn) if return_final_states else y_blhp

    with torch.autocast(x.device.type, enabled=False):
        delta_blh = step_sizes(dt, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        delta_blh = delta_blh.to(state_dtype(x))
        log_a_blh = delta_blh * A.to(delta_blh.dtype)
        document_bl = None if seq_idx is None else document_ordinals(seq_idx)
        skip = None if D is None else D.unsqueeze(-1) if D.ndim == 1 else D
        if chosen == "cpu":
            in_matrix = D if D is not None and D.ndim == 1 else None
            y_blhp, state_bhpn = ssd_chunked_cpu(
                x,
                delta_blh,
                log_a_blh,
                B,
                C,
                D_h=in_matrix,
                initial_states_bhpn=initial_states,
                document_bl=document_bl,
                chunk_size=chunk_size,
            )
            skip = None if in_matrix is not None else skip
        else:
            y_blhp, state_bhpn = ssd_chunked(
                (x * delta_blh.unsqueeze(-1)).to(x.dtype),
                log_a_blh,
                B,
                C,
                initial_states_bhpn=initial_states,
                document_bl=document_bl,
                chunk_size=chunk_size,
            )
        y_blhp = skip_and_gate(y_blhp, x, skip, z)
    return (y_blhp, state_bhpn) if return_final_states else y_blhp
