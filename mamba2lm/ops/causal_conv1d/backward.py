"""Triton kernel of the causal convolution's backward pass.

With u the sum before the activation (recomputed) and g = dy act'(u),

    dx_s = Σ_j v_j g_{s+j},   dv_j = Σ_t g_t x_{t-j},   dbias = Σ_t g_t

A program walks down its rows as the forward kernel does, w-1 rows ahead of the gradient that it
writes: g at row r completes dx at row r-(w-1). The rows of g that a program needs beyond its own
are computed again by the next one. Sums over rows are left as one partial sum per program.

Letters and strides: as in ``forward.py``.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (no unpacking into tuples there either)

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.causal_conv1d.forward import (
    channel_filter,
    continues,
    input_row,
    input_rows,
    row_mask,
    sigmoid,
    tap_sum,
)


@triton.jit
def final_gradient(
    dfinal_ptr, s, same, length, c, inside, d, HAS_IDS: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Load what the final state adds to the gradient of x_s; ``same`` is of the w-1 rows after."""
    row = s - (length - (W - 1))
    mask = row_mask(row, 0, W - 1, c, inside)
    if HAS_IDS:
        for j in tl.static_range(W - 1):
            mask = tl.where(same[j], mask, False)
    row = tl.cast(row, tl.int64)
    return tl.load(dfinal_ptr + row * d + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "dy_b", "dy_l", "x_b", "x_l", "dx_b", "dx_l", "ids_b", "ids_l",
        "length", "d", "row_blocks", "channel_blocks", "row_count",
    ]
)  # fmt: skip
def convolve_backward_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr,
    dx_ptr, dinitial_ptr, partial_ptr,
    dy_b, dy_l, x_b, x_l, dx_b, dx_l, ids_b, ids_l,
    length, d, row_blocks, channel_blocks, row_count,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    HAS_IDS: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, AHEAD: tl.constexpr, PREFETCH: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute dx of ``row_count`` rows of a block of channels, and partial sums for the filter.

    The sums are over rows w-1 later than those of dx, the first program of a sequence also taking
    the first w-1, so that every row counts once.
    """
    pid = tl.program_id(0)
    start = (pid // channel_blocks % row_blocks) * row_count
    b = tl.cast(pid // channel_blocks // row_blocks, tl.int64)
    d *= UNIT
    x_l *= UNIT
    dy_l *= UNIT
    dx_l *= UNIT
    c = (pid % channel_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < d
    x_ptr += b * x_b * UNIT
    dy_ptr += b * dy_b * UNIT
    dx_ptr += b * dx_b * UNIT
    ids_ptr += b * ids_b
    initial_ptr += b * (W - 1) * d
    dinitial_ptr += b * (W - 1) * d
    dfinal_ptr += b * (W - 1) * d
    taps, bias = channel_filter(weight_ptr, bias_ptr, c, inside, HAS_BIAS, W)
    dtaps = ()
    for _ in tl.static_range(W):
        dtaps = dtaps + (tl.zeros((BLOCK,), tl.float32),)
    dbias = tl.zeros((BLOCK,), tl.float32)

    history = ()
    for j in tl.static_range(1, W):
        history = history + (
            input_row(
                x_ptr, x_l, initial_ptr, start - W + j, length, c, inside, d, HAS_INITIAL, W
            ),
        )  # fmt: skip
    counted = start == 0
    # The last row that this program reads is w-1 rows after its last dx.
    end = tl.minimum(start + row_count + (W - 1), length)
    first_xs = input_rows(x_ptr, x_l, start, end, c, inside, W - 1)
    first_dys = input_rows(dy_ptr, dy_l, start, end, c, inside, W - 1)
    coming_xs = ()
    coming_dys = ()
    if PREFETCH:
        coming_xs = input_rows(x_ptr, x_l, start + W - 1, end, c, inside, AHEAD)
        coming_dys = input_rows(dy_ptr, dy_l, start + W - 1, end, c, inside, AHEAD)
    gs, same, history, dtaps, dbias = rows_backward(
        first_xs, first_dys, ids_ptr, ids_l, start, history, taps, bias, dtaps, dbias, counted,
        length, HAS_IDS, SILU, NVIDIA, W, W - 1,
    )  # fmt: skip
    if HAS_INITIAL and start == 0:
        for i in tl.static_range(W - 1):  # the input w-1-i rows before position 0
            reached = ()
            flags = ()
            for j in tl.static_range(W):
                if i + j < W - 1:
                    reached = reached + (tl.zeros((BLOCK,), tl.float32),)
                else:
                    reached = reached + (gs[i + j - (W - 1)],)
                if HAS_IDS and j > 0:
                    flags = flags + (continues(ids_ptr, ids_l, i + j - (W - 1), length),)
            dinitial = tap_sum(reached, flags, taps, 0.0, HAS_IDS, W)
            if HAS_DFINAL:
                dinitial += final_gradient(
                    dfinal_ptr, i - (W - 1), flags, length, c, inside, d, HAS_IDS, W
                )
            out = dinitial_ptr + i * d + c
            tl.store(out, dinitial.to(dinitial_ptr.dtype.element_ty), mask=inside)
    for done in range(0, row_count, AHEAD):
        first = start + done
        later = first + W - 1
        if PREFETCH:
            xs = coming_xs
            dys = coming_dys
            coming_xs = input_rows(x_ptr, x_l, later + AHEAD, end, c, inside, AHEAD)
            coming_dys = input_rows(dy_ptr, dy_l, later + AHEAD, end, c, inside, AHEAD)
        else:
            xs = input_rows(x_ptr, x_l, later, end, c, inside, AHEAD)
            dys = input_rows(dy_ptr, dy_l, later, end, c, inside, AHEAD)
        new_gs, new_same, history, dtaps, dbias = rows_backward(
            xs, dys, ids_ptr, ids_l, later, history, taps, bias, dtaps, dbias, True, length,
            HAS_IDS, SILU, NVIDIA, W, AHEAD,
        )  # fmt: skip
        gs = gs + new_gs
        same = same + new_same
        for i in tl.static_range(AHEAD):
            dx = tap_sum(gs[i : i + W], same[i + 1 : i + W], taps, 0.0, HAS_IDS, W)
            if HAS_DFINAL:
                dx += final_gradient(
                    dfinal_ptr, first + i, same[i + 1 : i + W], length, c, inside, d, HAS_IDS, W
                )
            out = dx_ptr + tl.cast(first + i, tl.int64) * dx_l + c
            mask = row_mask(first + i, 0, length, c, inside)
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        gs = gs[AHEAD:]
        same = same[AHEAD:]
    split = tl.cast(pid // channel_blocks, tl.int64)
    partial_ptr += split * (W + 1 if HAS_BIAS else W) * d + c
    for k in tl.static_range(W):
        tl.store(partial_ptr + k * d, dtaps[W - 1 - k], mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + W * d, dbias, mask=inside)


@triton.jit
def rows_backward(
    xs, dys, ids_ptr, ids_l, first, history, taps, bias, dtaps, dbias, counted, length,
    HAS_IDS: tl.constexpr, SILU: tl.constexpr, NVIDIA: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Compute g for ROWS rows from ``first`` on and add their part of the filter's gradient.

    Args:
        xs, dys: Those rows, zero outside the sequence.
        history: The w-1 inputs before them, the oldest first.

    Returns:
        The rows of g; whether each continues the row before; the last w-1 inputs; dtaps and dbias.
    """
    rows = history + xs
    same = ()
    if HAS_IDS:
        for i in tl.static_range(ROWS + W - 2):
            same = same + (continues(ids_ptr, ids_l, first - W + 2 + i, length),)
    gs = ()
    for i in tl.static_range(ROWS):
        by_lag = ()
        flags = ()
        for j in tl.static_range(W):
            by_lag = by_lag + (rows[i + W - 1 - j],)
            if HAS_IDS and j < W - 1:
                flags = flags + (same[i + W - 2 - j],)
        g = dys[i].to(tl.float32)
        if SILU:
            u = tap_sum(by_lag, flags, taps, bias, HAS_IDS, W)
            s = sigmoid(u, NVIDIA)
            g *= s + u * s * (1.0 - s)
        gs = gs + (g,)
        g = tl.where(counted, g, 0.0)
        dbias += g
        reached = True
        sums = ()
        for j in tl.static_range(W):
            x = by_lag[j].to(tl.float32)
            if HAS_IDS and j > 0:
                reached = reached & flags[j - 1]
                x = tl.where(reached, x, 0.0)
            sums = sums + (dtaps[j] + g * x,)
        dtaps = sums
    return gs, same[W - 2 :], rows[ROWS:], dtaps, dbias
