"""Triton kernel of RMS normalisation's backward pass.

With u the normalised input (u = x silu(z) is recomputed), v = u r and e = dy weight,

    du = r (e - v mean(e v)),   dweight = Σ dy v,   dx = du silu(z),   dz = du x silu'(z)

and du also receives the gradient of the sum where the forward pass returned one. Programs keep
their part of dweight in registers over all their rows and leave one partial sum each.

Letters and strides: as in ``forward.py``.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (no unpacking into tuples there either)

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.gated_rms_norm.forward import load_pieces, load_weight, store_piece


@triton.jit(
    do_not_specialize=[
        "dy_t", "dsum_t", "x_t", "z_t", "dx_t", "dz_t", "y_t", "t_size", "groups", "steps",
    ]
)  # fmt: skip
def rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, z_ptr, weight_ptr, scale_ptr,
    dx_ptr, dz_ptr, dresidual_ptr, y_ptr, partial_ptr,
    dy_t, dsum_t, x_t, z_t, dx_t, dz_t, y_t, t_size, groups, steps,
    GATED: tl.constexpr, HAS_DSUM: tl.constexpr, TWO_DTYPES: tl.constexpr, WANT_Y: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of ``steps`` blocks of rows of one group, and y again if wanted.

    TWO_DTYPES: the gradient of the sum is stored twice, as dx and as dresidual.
    """
    k = tl.program_id(0) % groups
    block = tl.cast(tl.program_id(0) // groups, tl.int64)
    first = block * steps * ROWS
    dy_t *= UNIT
    dsum_t *= UNIT
    x_t *= UNIT
    z_t *= UNIT
    dx_t *= UNIT
    dz_t *= UNIT
    y_t *= UNIT
    d = groups * WIDTH
    start = k * WIDTH
    weight = load_weight(weight_ptr + start, WIDTH, PIECE, PIECES)
    dweight = ()
    for _ in tl.static_range(PIECES):
        dweight = dweight + (tl.zeros((ROWS, PIECE), tl.float32),)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = first + step * ROWS
        left = t_size - t
        xs = load_pieces(x_ptr + t * x_t + start, x_t, left, ROWS, WIDTH, PIECE, PIECES)
        dys = load_pieces(dy_ptr + t * dy_t + start, dy_t, left, ROWS, WIDTH, PIECE, PIECES)
        if GATED:
            zs = load_pieces(z_ptr + t * z_t + start, z_t, left, ROWS, WIDTH, PIECE, PIECES)
        if HAS_DSUM:
            dsums = load_pieces(
                dsum_ptr + t * dsum_t + start, dsum_t, left, ROWS, WIDTH, PIECE, PIECES
            )
        r = tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + (t + r) * groups + k, mask=r < left, other=0.0)[:, None]
        along = tl.zeros((ROWS, PIECE), tl.float32)
        sigmoids = ()
        sums = ()
        for i in tl.static_range(PIECES):
            v = xs[i].to(tl.float32) * scale
            if GATED:
                z = zs[i].to(tl.float32)
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                sigmoids = sigmoids + (sigmoid,)
                v *= z * sigmoid
            product = dys[i].to(tl.float32) * v
            along += product * weight[i]
            sums = sums + (dweight[i] + product,)
        dweight = sums
        mean = (tl.sum(along, axis=1) / WIDTH)[:, None]
        for i in tl.static_range(PIECES):
            x = xs[i].to(tl.float32)
            v = x * scale
            if GATED:
                z = zs[i].to(tl.float32)
                gate = z * sigmoids[i]
                v *= gate
            du = scale * (dys[i].to(tl.float32) * weight[i] - v * mean)
            if HAS_DSUM:
                du += dsums[i].to(tl.float32)
            if GATED:
                dz = du * x * sigmoids[i] * (1.0 + z * (1.0 - sigmoids[i]))
                store_piece(dz_ptr + t * dz_t + start, dz_t, left, dz, i, ROWS, WIDTH, PIECE)
                du *= gate
            store_piece(dx_ptr + t * dx_t + start, dx_t, left, du, i, ROWS, WIDTH, PIECE)
            if TWO_DTYPES:
                store_piece(dresidual_ptr + t * d + start, d, left, du, i, ROWS, WIDTH, PIECE)
            if WANT_Y:  # to the last bit what the forward pass gave: a layer may keep that instead
                u = x
                if GATED:
                    u = x * z / (1.0 + tl.exp(-z))
                y = u * scale * weight[i]
                store_piece(y_ptr + t * y_t + start, y_t, left, y, i, ROWS, WIDTH, PIECE)
    c = tl.arange(0, PIECE)
    for i in tl.static_range(PIECES):
        out = partial_ptr + block * d + start + i * PIECE + c
        tl.store(out, tl.sum(dweight[i], axis=0), mask=c < WIDTH - i * PIECE)
