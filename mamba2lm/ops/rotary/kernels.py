"""Triton kernel that rotates pairs of channels by the angles of their position.

    y_i = x_i cos - x_{i+r} sin,   y_{i+r} = x_{i+r} cos + x_i sin

The gradient is the rotation back, by the same kernel. Computed in float32, rounded once; channels
from 2r on are copied.

Letters: b batch, l length, h heads, p head dim, r rotated pairs. Strides as ``x_b``; those of the
angles are 0 on axes that have one entry for all.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["x_b", "x_l", "x_h", "y_b", "y_l", "y_h", "a_b", "a_l", "length", "heads"]
)
def rotary_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr,
    x_b, x_l, x_h, y_b, y_l, y_h, a_b, a_l, length, heads,
    BACK: tl.constexpr, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rotate ``HEADS`` heads at ``ROWS`` positions of one sequence; ``BACK`` by minus the angle."""
    b = tl.cast(tl.program_id(2), tl.int64)
    n = tl.arange(0, ROWS * HEADS)
    t = tl.program_id(1) * ROWS + n // HEADS
    h = tl.program_id(0) * HEADS + n % HEADS
    inside = (t < length) & (h < heads)
    t = tl.cast(t, tl.int64)
    x_ptr += b * x_b * UNIT + (t * (x_l * UNIT) + h * (x_h * UNIT))[:, None]
    y_ptr += b * y_b * UNIT + (t * (y_l * UNIT) + h * (y_h * UNIT))[:, None]
    i = tl.arange(0, PAIR_BLOCK)[None, :]
    mask = inside[:, None] & (i < PAIRS)
    angle = b * a_b + (t * a_l)[:, None] + i
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if BACK:
        sin = -sin
    first = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + PAIRS + i, mask=mask, other=0.0).to(tl.float32)
    element = y_ptr.dtype.element_ty
    tl.store(y_ptr + i, (first * cos - second * sin).to(element), mask=mask)
    tl.store(y_ptr + PAIRS + i, (second * cos + first * sin).to(element), mask=mask)
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)[None, :]
        mask = inside[:, None] & (j < REST)
        rest = tl.load(x_ptr + 2 * PAIRS + j, mask=mask, other=0.0)
        tl.store(y_ptr + 2 * PAIRS + j, rest.to(element), mask=mask)
