"""The public one-token state updates.

Letters: b batch, h heads, p head dim, g groups, d channels, n state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2lm.ops.discretisation import NO_LIMIT, check_limit, step_sizes
from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape, state_dtype
from mamba2lm.ops.skip_and_gate import skip_and_gate
from mamba2lm.ops.state_update.launch import state_step_triton, unsupported
from mamba2lm.ops.state_update.reference import selective_step, ssd_step


def ssd_state_update(
    state: Tensor,
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
    A_is_log: bool = False,
    in_place: bool = False,
    early: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the SSD recurrence of Mamba-2 by one token.

    Args:
        state: State before the token, (b, h, p, n).
        x: Input, (b, h, p).
        dt: Raw step size, (b, h).
        A: Negative decay rates, (h,).
        B: Input map, (b, g, n) with h divisible by g.
        C: Output map, (b, g, n).
        D: Skip weights, (h,) or (h, p).
        z: Gate, (b, h, p).
        dt_bias: Bias of the step size, (h,).
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Smallest and largest step size Δ, honoured here as in ``ssd``.
        A_is_log: Whether ``A`` holds log(−A), as layers keep it.
        in_place: Overwrite ``state``, which is then what is returned.
        early: A promise that the kernel before on a GPU's stream does not write ``state``, which
            then may be read while that one ends.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        y (b, h, p) in the dtype of x and the new state (b, h, p, n) in the dtype of ``state``,
        which is left as it was unless ``in_place``.

    Raises:
        ValueError: A tensor of the wrong shape, or an implementation that does not exist.

    Source: Dao & Gu 2024 (arXiv:2405.21060), equation 1.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b h p", sizes)
    expect_shape("dt", dt, "b h", sizes)
    expect_shape("A", A, "h", sizes)
    expect_shape("B", B, "b g n", sizes)
    expect_shape("C", C, "b g n", sizes)
    expect_shape("state", state, "b h p n", sizes)
    if D is not None:
        expect_shape("D", D, "h" if D.ndim == 1 else "h p", sizes)
    if z is not None:
        expect_shape("z", z, "b h p", sizes)
    if dt_bias is not None:
        expect_shape("dt_bias", dt_bias, "h", sizes)
    if sizes["h"] % sizes["g"]:
        raise ValueError(
            f"B has {sizes['g']} groups (axis 1), which do not divide the {sizes['h']} heads of x."
        )
    reason = unsupported(state, x, dt, A, B, C, D, z, dt_bias)
    if choose_impl("ssd_state_update", impl, x, unsupported=reason) == "triton":
        check_limit(dt_limit)
        y, new, _ = state_step_triton(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, A_is_log, in_place, early,
        )  # fmt: skip
        return y, new
    dtype = state_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        A = -torch.exp(A) if A_is_log else A
        delta_bh = step_sizes(dt, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        y_bhp, new_bhpn = ssd_step(
            state.to(dtype), x.to(dtype), delta_bh.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
        )
        skip = None if D is None else D.unsqueeze(-1) if D.ndim == 1 else D
        y_bhp = skip_and_gate(y_bhp.to(x.dtype), x, skip, z)
    return y_bhp, _kept(new_bhpn, state, in_place)


def ssd_state_update_normed(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    z: Tensor,
    norm: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    A_is_log: bool = False,
    early: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the SSD recurrence in place, and do of the gated RMSNorm behind it what is local.

    The rest, a factor a row and group, is ``linear_step``'s ``scale``; so a layer needs no pass
    between its recurrence and its product.

    Args:
        norm: The norm's weight, (h·p,).

    Other Args: as ``ssd_state_update``.

    Returns:
        y · SiLU(z) · norm (b, h, p) in the dtype of x, and the sums of the squares of y · SiLU(z)
        over equal parts of (h, p), in order: (b, parts), float32, the parts a multiple of h.

    Raises:
        ValueError: A tensor of the wrong shape.
    """
    expect_shape("norm", norm, "hp", {"hp": x.shape[1] * x.shape[2]})
    reason = unsupported(state, x, dt, A, B, C, D, z, dt_bias, norm)
    if choose_impl("ssd_state_update_normed", impl, x, unsupported=reason) == "triton":
        check_limit(dt_limit)
        y_bhp, _, squares_bs = state_step_triton(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, A_is_log, True, early,
            norm,
        )  # fmt: skip
        assert squares_bs is not None
        return y_bhp, squares_bs
    y_bhp, _ = ssd_state_update(
        state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, A_is_log=A_is_log, in_place=True, impl=impl,
    )  # fmt: skip
    wide_bhp = y_bhp.to(state_dtype(x))
    squares_bh = wide_bhp.square().sum(dim=-1)
    return (wide_bhp * norm.unflatten(0, x.shape[1:])).to(x.dtype), squares_bh.float()


def selective_state_update(
    state: Tensor,
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
    A_is_log: bool = False,
    in_place: bool = False,
    early: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the selective recurrence of Mamba-1 by one token.

    Args:
        state: State before the token, (b, d, n).
        x: Input, (b, d).
        dt: Raw step size, (b, d).
        A: Negative decay rates, (d, n).
        B: Input map, (b, n).
        C: Output map, (b, n).
        D: Skip weights, (d,).
        z: Gate, (b, d).
        dt_bias: Bias of the step size, (d,).
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Smallest and largest step size Δ, honoured here as in ``selective_scan``.
        A_is_log: Whether ``A`` holds log(−A), as layers keep it.
        in_place: Overwrite ``state``, which is then what is returned.
        early: A promise that the kernel before on a GPU's stream does not write ``state``, which
            then may be read while that one ends.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        y (b, d) in the dtype of x and the new state (b, d, n) in the dtype of ``state``, which
        is left as it was unless ``in_place``.

    Raises:
        ValueError: A tensor of the wrong shape, or an implementation that does not exist.

    Source: Gu & Dao 2023 (arXiv:2312.00752), equation 2a.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b d", sizes)
    expect_shape("dt", dt, "b d", sizes)
    expect_shape("A", A, "d n", sizes)
    expect_shape("B", B, "b n", sizes)
    expect_shape("C", C, "b n", sizes)
    expect_shape("state", state, "b d n", sizes)
    if D is not None:
        expect_shape("D", D, "d", sizes)
    if z is not None:
        expect_shape("z", z, "b d", sizes)
    if dt_bias is not None:
        expect_shape("dt_bias", dt_bias, "d", sizes)
    reason = unsupported(state, x, dt, A, B, C, D, z, dt_bias)
    if choose_impl("selective_state_update", impl, x, unsupported=reason) == "triton":
        check_limit(dt_limit)
        y, new, _ = state_step_triton(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, A_is_log, in_place, early
        )  # fmt: skip
        return y, new
    dtype = state_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        A = -torch.exp(A) if A_is_log else A
        delta_bd = step_sizes(dt, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        y_bd, new_bdn = selective_step(
            state.to(dtype), x.to(dtype), delta_bd.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
        )
        y_bd = skip_and_gate(y_bd.to(x.dtype), x, D, z)
    return y_bd, _kept(new_bdn, state, in_place)


def _kept(new: Tensor, state: Tensor, in_place: bool) -> Tensor:
    return state.copy_(new) if in_place else new.to(state.dtype)
