"""Triton kernel of the causal convolution's forward pass, and what both passes share.

    y_t = act( Σ_j v_j x_{t-j} + bias ),   v_j = weight_{w-1-j}, j the lag

A program owns a block of channels and walks down a stretch of rows, the w-1 rows before the
current one in registers: every input is read once. Rows are loaded a few at a time before the first
of them is used, since the compiler cannot move a load above a store and a single row in flight
would leave memory idle; with PREFETCH they are on their way while those before are computed.
Everything is computed in float32.

Letters: b batch, l length, d channels (c a block of them), w conv width. ``x_b`` and the like are
strides, divided by ``UNIT``, a power of two: multiplying by it again shows the compiler that rows
are aligned, also where a stride is a multiple of 8 only.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (no unpacking into tuples there either)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_filter(
    weight_ptr, bias_ptr, c, inside, HAS_BIAS: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Load the taps of a block of channels, the one of lag 0 first, and the bias, in float32."""
    taps = ()
    for j in tl.static_range(W):
        v = tl.load(weight_ptr + c * W + (W - 1 - j), mask=inside, other=0.0)
        taps = taps + (v.to(tl.float32),)
    bias = tl.zeros_like(taps[0])
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def sigmoid(u, NVIDIA: tl.constexpr):
    """Compute 1 / (1 + exp(-u)); on NVIDIA's GPUs in 4 instructions, good to a few ulp."""
    if NVIDIA:
        # What the compiler makes of the formula scales against denormals, which are 0 here.
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [u * -1.4426950408889634],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def row_mask(t, low, high, c, inside):
    """Mask a row of channels by whether low ≤ t < high."""
    # The comparison is spread over the row first: 3.9's interpreter mistypes a scalar one.
    row = t + tl.zeros_like(c)
    return inside & (row >= low) & (row < high)


@triton.jit
def input_row(
    x_ptr, x_l, initial_ptr, t, length, c, inside, d, HAS_INITIAL: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Load x_t of one sequence; before position 0 the initial state, elsewhere outside zero."""
    wide = tl.cast(t, tl.int64)
    x = tl.load(x_ptr + wide * x_l + c, mask=row_mask(t, 0, length, c, inside), other=0.0)
    if HAS_INITIAL:
        early = row_mask(t, 1 - W, 0, c, inside)
        before = tl.load(initial_ptr + (wide + (W - 1)) * d + c, mask=early, other=0.0)
        x = tl.where(t < 0, before.to(x.dtype), x)
    return x


@triton.jit
def input_rows(x_ptr, x_l, first, end, c, inside, ROWS: tl.constexpr):
    """Load ROWS rows from ``first`` ≥ 0 on; from ``end`` on they are zero."""
    rows = ()
    for i in tl.static_range(ROWS):
        t = first + i
        mask = row_mask(t, 0, end, c, inside)
        rows = rows + (tl.load(x_ptr + tl.cast(t, tl.int64) * x_l + c, mask=mask, other=0.0),)
    return rows


@triton.jit
def continues(ids_ptr, ids_l, t, length):
    """Say whether x_t is of the document of x_{t-1}; true outside the sequence."""
    last = length - 1
    ids_l = tl.cast(ids_l, tl.int64)
    here = tl.load(ids_ptr + tl.minimum(tl.maximum(t, 0), last) * ids_l)
    before = tl.load(ids_ptr + tl.minimum(tl.maximum(t - 1, 0), last) * ids_l)
    return here == before


@triton.jit
def tap_sum(rows, same, taps, bias, HAS_IDS: tl.constexpr, W: tl.constexpr):
    """Sum taps over inputs by lag: ``rows[j]`` is j rows back and its row continues by same[j]."""
    total = bias + taps[0] * rows[0].to(tl.float32)
    reached = True
    for j in tl.static_range(1, W):
        x = rows[j].to(tl.float32)
        if HAS_IDS:
            reached = reached & same[j - 1]
            x = tl.where(reached, x, 0.0)
        total += taps[j] * x
    return total


# Integers are not specialised on: a compilation takes seconds, and lengths come in all sizes.
@triton.jit(
    do_not_specialize=[
        "x_b", "x_l", "ids_b", "ids_l", "length", "d", "row_blocks", "channel_blocks", "row_count",
    ]
)  # fmt: skip
def convolve_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, ids_ptr, y_ptr, final_ptr,
    x_b, x_l, ids_b, ids_l, length, d, row_blocks, channel_blocks, row_count,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr,
    WANT_FINAL: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, AHEAD: tl.constexpr, PREFETCH: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Convolve ``row_count`` rows of a block of channels; the last ones make the final state."""
    pid = tl.program_id(0)
    start = (pid // channel_blocks % row_blocks) * row_count
    b = tl.cast(pid // channel_blocks // row_blocks, tl.int64)
    d *= UNIT
    x_l *= UNIT
    c = (pid % channel_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < d
    x_ptr += b * x_b * UNIT
    ids_ptr += b * ids_b
    initial_ptr += b * (W - 1) * d
    y_ptr += b * length * d
    taps, bias = channel_filter(weight_ptr, bias_ptr, c, inside, HAS_BIAS, W)
    # Rows before the current one, the oldest first, as every tuple of rows below.
    history = ()
    for j in tl.static_range(1, W):
        history = history + (
            input_row(
                x_ptr, x_l, initial_ptr, start - W + j, length, c, inside, d, HAS_INITIAL, W
            ),
        )  # fmt: skip
    end = tl.minimum(start + row_count, length)
    coming = ()
    if PREFETCH:
        coming = input_rows(x_ptr, x_l, start, end, c, inside, AHEAD)
    for done in range(0, row_count, AHEAD):
        first = start + done
        if PREFETCH:
            rows = history + coming
            coming = input_rows(x_ptr, x_l, first + AHEAD, end, c, inside, AHEAD)
        else:
            rows = history + input_rows(x_ptr, x_l, first, end, c, inside, AHEAD)
        same = ()
        if HAS_IDS:
            for i in tl.static_range(AHEAD + W - 2):
                same = same + (continues(ids_ptr, ids_l, first - W + 2 + i, length),)
        for i in tl.static_range(AHEAD):
            by_lag = ()
            same_by_lag = ()
            for j in tl.static_range(W):
                by_lag = by_lag + (rows[i + W - 1 - j],)
                if HAS_IDS and j < W - 1:
                    same_by_lag = same_by_lag + (same[i + W - 2 - j],)
            y = tap_sum(by_lag, same_by_lag, taps, bias, HAS_IDS, W)
            if SILU:
                y *= sigmoid(y, NVIDIA)
            out = y_ptr + tl.cast(first + i, tl.int64) * d + c
            mask = row_mask(first + i, 0, length, c, inside)
            tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)
        history = rows[AHEAD:]
    if WANT_FINAL and start + row_count >= length:
        reached = True
        for j in tl.static_range(1, W):  # from the last position back
            t = length - j
            x = input_row(x_ptr, x_l, initial_ptr, t, length, c, inside, d, HAS_INITIAL, W)
            if HAS_IDS:
                x = tl.where(reached, x, 0.0)
                reached = reached & continues(ids_ptr, ids_l, t, length)
            tl.store(final_ptr + (b * (W - 1) + (W - 1 - j)) * d + c, x, mask=inside)
