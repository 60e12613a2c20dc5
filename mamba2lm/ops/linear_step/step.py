"""Triton kernels of a linear map of few rows, fused with what stands before and after it.

    u = RMSNorm(x silu(z)) · norm,   v = W u + bias,   v_c = silu(conv(v_c)),   y = residual + v

Every part beside the product is optional. With few rows the time is that of reading W once, so a
program takes some outputs n of all rows and streams their rows of W; what it needs of x is small
and comes from the cache. The scale of a norm is one number a row and group: it is applied to the
sums, so the norm costs no pass of its own. Where the kernel before has multiplied by the norm's
weight and left sums of squares (``SQUARES`` a group), that number is all that is left of the norm.
A convolution's channel is an output, so the program that makes it also owns what it remembers.

``vector_kernel`` takes one row, with products in float32 outside the tensor cores; ``rows_kernel``
takes up to a block of rows through ``tl.dot``; with many, ``norm_kernel`` goes before it.

With ``CHAIN`` the next kernel of the stream may begin while this one ends (programmatic dependent
launch): what precedes ``wait_for_previous`` may read only what no kernel of the last few writes,
that is parameters; so their first tiles are on their way while the previous kernel still runs.

Letters: r rows (batch), n outputs, k inputs, c convolved channels.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportCallIssue=false
# pyright: reportAssignmentType=false
# ruff: noqa: RUF005 (no unpacking into tuples there either)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mamba2lm.ops.selective_scan.forward import sigmoid

LINE = tl.constexpr(64)
"""Elements of a cache line, if they are of two bytes."""

MOST_EARLY = tl.constexpr(64)
"""Parts of a norm's squares that are loaded before the products they are needed after."""


@triton.jit
def wait_for_previous(CHAIN: tl.constexpr):
    """Wait until the previous kernel has written all it writes, then let the next one begin."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptrs):
    """Ask for cache lines that will be loaded later."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def gate_and_square(x, z, norm, GATED: tl.constexpr, NORMED: tl.constexpr):
    """Return inputs, gated, times the norm's weight, and their squares before it."""
    u = x.to(tl.float32)
    if GATED:
        z = z.to(tl.float32)
        u = u * z * sigmoid(z)
    squares = u * u
    if NORMED:
        u = u * norm.to(tl.float32)
    return u, squares


@triton.jit
def load_around(
    n, r, mask, bias_ptr, residual_ptr, taps_ptr, taps_bias_ptr, kept_ptr,
    n_size, residual_r, kept_r, start, channels,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TAPS: tl.constexpr,
    HAS_TAPS_BIAS: tl.constexpr,
):  # fmt: skip
    """Load what ``finish`` needs, so that it is there when the sums are."""
    bias, residual, taps_bias = 0.0, 0.0, 0.0
    taps, kept = (), ()
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + r * residual_r + n, mask=mask, other=0.0).to(tl.float32)
    if TAPS > 0:
        c = n - start
        convolved = (c >= 0) & (c < channels)
        mine = mask & convolved
        for j in tl.static_range(TAPS):
            tap = tl.load(taps_ptr + c * TAPS + j, mask=convolved, other=0.0)
            taps = taps + (tap.to(tl.float32),)
        for j in tl.static_range(TAPS - 1):
            kept_ptrs = kept_ptr + r * kept_r + (j * channels + c)
            kept = kept + (tl.load(kept_ptrs, mask=mine, other=0.0),)
        if HAS_TAPS_BIAS:
            taps_bias = tl.load(taps_bias_ptr + c, mask=convolved, other=0.0).to(tl.float32)
    return bias, residual, taps, taps_bias, kept


@triton.jit
def finish(
    value, around, n, r, mask, y_ptr, kept_ptr, n_size, kept_r, start, channels,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Add the bias, convolve what is to be convolved, add the residual, and store."""
    bias, residual, taps, taps_bias, kept = around
    value += bias
    if TAPS > 0:
        c = n - start
        convolved = (c >= 0) & (c < channels)
        mine = mask & convolved
        # What a channel remembers is what it convolves, rounded as it is.
        fresh = value.to(kept_ptr.dtype.element_ty)
        total = fresh.to(tl.float32) * taps[TAPS - 1] + taps_bias
        for j in tl.static_range(TAPS - 1):
            total += kept[j].to(tl.float32) * taps[j]
        # Where several threads hold one channel, all must have read it before one writes.
        tl.debug_barrier()
        for j in tl.static_range(1, TAPS - 1):
            tl.store(kept_ptr + r * kept_r + ((j - 1) * channels + c), kept[j], mask=mine)
        if TAPS > 1:
            tl.store(kept_ptr + r * kept_r + ((TAPS - 2) * channels + c), fresh, mask=mine)
        value = tl.where(convolved, total * sigmoid(total), value)
    value += residual
    tl.store(y_ptr + tl.cast(r, tl.int64) * n_size + n, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(rows_ptr, i: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the i-th tile of rows of W, counted over all groups."""
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)[None, :] + (i % TILES) * BLOCK_K
    ptrs = rows_ptr + (i // TILES) * WIDTH + k
    if WIDTH % BLOCK_K == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=k < WIDTH, other=0.0)


@triton.jit
def load_inputs(
    base_ptr, i: tl.constexpr, WANTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Load the i-th tile of a vector over the inputs, counted over all groups."""
    if WANTED:
        TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
        k = tl.arange(0, BLOCK_K) + (i % TILES) * BLOCK_K
        return tl.load(base_ptr + (i // TILES) * WIDTH + k, mask=k < WIDTH, other=0.0)
    else:
        return 0.0


@triton.jit
def load_squares(
    squares_ptr, g: tl.constexpr, r, there, GROUPS: tl.constexpr, SQUARES: tl.constexpr
):
    """Load the ``SQUARES`` parts of the squares of a group of rows."""
    BLOCK: tl.constexpr = triton.next_power_of_2(SQUARES)
    s = tl.arange(0, BLOCK)
    ptrs = squares_ptr + r[None, :] * (GROUPS * SQUARES) + (g * SQUARES + s[:, None])
    return tl.load(ptrs, mask=(s < SQUARES)[:, None] & there[None, :], other=0.0)


@triton.jit
def scale_of(squares, eps, WIDTH: tl.constexpr):
    """Return what a norm multiplies rows by."""
    return tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)


@triton.jit(do_not_specialize=["start"])
def vector_kernel(
    x_ptr, z_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    taps_ptr, taps_bias_ptr, kept_ptr, squares_ptr,
    n_size, k_size, start, channels, eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr, HAS_TAPS_BIAS: tl.constexpr, SQUARES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Make ``BLOCK_N`` outputs of one row.

    The inputs are ``GROUPS`` groups of ``WIDTH`` that are normalised apart, each taken in tiles of
    ``BLOCK_K``; the first ``AHEAD`` tiles of W are loaded before waiting.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Outputs that do not exist read the last one's weights.
    rows_ptr = weight_ptr + tl.cast(tl.minimum(n, n_size - 1), tl.int64)[:, None] * k_size
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    mask = n < n_size
    ahead, norms, xs, zs = (), (), (), ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (load_tile(rows_ptr, i, WIDTH, BLOCK_K),)
    for i in tl.static_range(GROUPS * TILES):
        norms = norms + (load_inputs(norm_ptr, i, NORMED, WIDTH, BLOCK_K),)
    wait_for_previous(CHAIN)
    # All that has a way to come is asked for before any of it is used.
    for i in tl.static_range(GROUPS * TILES):
        xs = xs + (load_inputs(x_ptr, i, True, WIDTH, BLOCK_K),)
        zs = zs + (load_inputs(z_ptr, i, GATED, WIDTH, BLOCK_K),)
    around = load_around(
        n, 0, mask, bias_ptr, residual_ptr, taps_ptr, taps_bias_ptr, kept_ptr,
        n_size, 0, 0, start, channels, HAS_BIAS, HAS_RESIDUAL, TAPS, HAS_TAPS_BIAS,
    )  # fmt: skip
    value = tl.zeros((BLOCK_N,), tl.float32)
    for g in tl.static_range(GROUPS):
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for i in tl.static_range(g * TILES, g * TILES + TILES):
            w = ahead[i] if i < AHEAD else load_tile(rows_ptr, i, WIDTH, BLOCK_K)
            u, square = gate_and_square(xs[i], zs[i], norms[i], GATED, NORMED)
            squares += square
            total += w.to(tl.float32) * u[None, :]
        sums = tl.sum(total, axis=1)
        if NORMED:
            sums *= tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
        if SQUARES > 0:
            r = tl.zeros((1,), tl.int32)
            parts = load_squares(squares_ptr, g, r, r == 0, GROUPS, SQUARES)
            sums *= tl.sum(scale_of(parts, eps, WIDTH), axis=0)
        value += sums
    finish(value, around, n, 0, mask, y_ptr, kept_ptr, n_size, 0, start, channels, TAPS)


@triton.jit
def last_sum(value, part_ptr, arrived_ptr, SPLIT: tl.constexpr):
    """Leave a part of a sum; return the whole sum and whether all parts have been left.

    Whoever leaves the last part adds them up, in one order whoever it is, and makes the count of
    arrivals ready for the next kernel.
    """
    n, r = tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    place = n * value.shape[1] + r
    size: tl.constexpr = value.shape[0] * value.shape[1]
    tl.store(part_ptr + tl.program_id(2) * size + place, value)
    # All threads must have written theirs before the count says so.
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == SPLIT - 1
    if last:
        value = tl.zeros_like(value)
        for i in tl.static_range(SPLIT):
            # Not from a cache that knows nothing of other processors' stores.
            value += tl.load(part_ptr + i * size + place, cache_modifier=".cg")
        tl.store(arrived_ptr, 0)
    return value, last


@triton.jit(do_not_specialize=["r_size"])
def rows_kernel(
    x_ptr, z_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    taps_ptr, taps_bias_ptr, kept_ptr, squares_ptr, parts_ptr, arrived_ptr,
    r_size, n_size, k_size, x_r, z_r, residual_r, kept_r, start, channels, eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr, HAS_TAPS_BIAS: tl.constexpr, SQUARES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, FLIP: tl.constexpr, AHEAD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Make ``BLOCK_N`` outputs of up to ``ROWS`` rows; as ``vector_kernel`` otherwise.

    W is the left factor, so that few rows waste little of the tensor cores; with ``FLIP`` the rows
    are, and neighbouring outputs lie in one thread.

    What is loaded before waiting, ``AHEAD`` tiles of W, goes no further than the cache. With
    ``SPLIT`` so many programs share the inputs of each group, and the last to end adds up.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows_ptr = weight_ptr + tl.cast(tl.minimum(n, n_size - 1), tl.int64)[:, None] * k_size
    here = (r < r_size)[None, :]
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    # Few parts wait in registers; many would take those that the products need.
    EARLY_SQUARES: tl.constexpr = SQUARES > 0 and SQUARES <= MOST_EARLY
    if SPLIT == 1:
        first, last = 0, TILES
    else:
        SHARE: tl.constexpr = (TILES + SPLIT - 1) // SPLIT
        first = tl.program_id(2) * SHARE
        last = tl.minimum(first + SHARE, TILES)
    if CHAIN and AHEAD * BLOCK_K >= LINE:
        line = tl.arange(0, AHEAD * BLOCK_K // LINE) * LINE + first * BLOCK_K
        prefetch(rows_ptr + tl.minimum(line, k_size - 1)[None, :])
    wait_for_previous(CHAIN)
    for g in tl.static_range(GROUPS):
        total = tl.zeros((ROWS, BLOCK_N) if FLIP else (BLOCK_N, ROWS), tl.float32)
        if NORMED:
            squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
        if EARLY_SQUARES:
            parts = load_squares(squares_ptr, g, r, r < r_size, GROUPS, SQUARES)
        for i in tl.range(first, last, num_stages=STAGES):
            k = tl.arange(0, BLOCK_K) + i * BLOCK_K
            inside = k < WIDTH
            k += g * WIDTH
            if WIDTH % BLOCK_K == 0:
                w = tl.load(rows_ptr + k[None, :])
            else:
                w = tl.load(rows_ptr + k[None, :], mask=inside[None, :], other=0.0)
            there = inside[:, None] & here
            x = tl.load(x_ptr + r[None, :] * x_r + k[:, None], mask=there, other=0.0)
            if NORMED:
                z = 0.0
                if GATED:
                    z = tl.load(z_ptr + r[None, :] * z_r + k[:, None], mask=there, other=0.0)
                norm = tl.load(norm_ptr + k[:, None], mask=inside[:, None], other=0.0)
                x, square = gate_and_square(x, z, norm, GATED, NORMED)
                squares += square
            x = x.to(w.dtype)
            if FLIP:
                total = tl.dot(tl.trans(x), tl.trans(w), total, input_precision="ieee")
            else:
                total = tl.dot(w, x, total, input_precision="ieee")
        if NORMED:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
            total *= scale[:, None] if FLIP else scale[None, :]
        if SQUARES > 0:
            if not EARLY_SQUARES:
                parts = load_squares(squares_ptr, g, r, r < r_size, GROUPS, SQUARES)
            scale = scale_of(parts, eps, WIDTH)
            total *= scale[:, None] if FLIP else scale[None, :]
        if g == 0:
            value = total
        else:
            value += total
    if FLIP:
        n, r = n[None, :], r[:, None]
    else:
        n, r = n[:, None], r[None, :]
    mask = (n < n_size) & (r < r_size)
    if SPLIT == 1:
        around = load_around(
            n, r, mask, bias_ptr, residual_ptr, taps_ptr, taps_bias_ptr, kept_ptr,
            n_size, residual_r, kept_r, start, channels,
            HAS_BIAS, HAS_RESIDUAL, TAPS, HAS_TAPS_BIAS,
        )  # fmt: skip
        finish(value, around, n, r, mask, y_ptr, kept_ptr, n_size, kept_r, start, channels, TAPS)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part_ptr = parts_ptr + tl.cast(tile, tl.int64) * (SPLIT * BLOCK_N * ROWS)
        value, complete = last_sum(value, part_ptr, arrived_ptr + tile, SPLIT)
        if complete:
            around = load_around(
                n, r, mask, bias_ptr, residual_ptr, taps_ptr, taps_bias_ptr, kept_ptr,
                n_size, residual_r, kept_r, start, channels,
                HAS_BIAS, HAS_RESIDUAL, TAPS, HAS_TAPS_BIAS,
            )  # fmt: skip
            finish(
                value, around, n, r, mask, y_ptr, kept_ptr, n_size, kept_r, start, channels, TAPS
            )


@triton.jit
def norm_kernel(
    x_ptr, z_ptr, norm_ptr, y_ptr, x_r, z_r, k_size, eps,
    GATED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Normalise a group of the inputs of a row, for rows too many to do so in every program."""
    r = tl.cast(tl.program_id(0), tl.int64)
    inside = tl.arange(0, BLOCK) < WIDTH
    k = tl.program_id(1) * WIDTH + tl.arange(0, BLOCK)
    norm = tl.load(norm_ptr + k, mask=inside, other=0.0)
    wait_for_previous(CHAIN)
    x = tl.load(x_ptr + r * x_r + k, mask=inside, other=0.0)
    z = 0.0
    if GATED:
        z = tl.load(z_ptr + r * z_r + k, mask=inside, other=0.0)
    u, square = gate_and_square(x, z, norm, GATED, True)
    y = u * tl.rsqrt(tl.sum(square, axis=0) / WIDTH + eps)
    tl.store(y_ptr + r * k_size + k, y.to(y_ptr.dtype.element_ty), mask=inside)
