"""Triton kernels of y = silu(gate) · up, forward and backward.

    dup = dy silu(gate),   dgate = dy up silu'(gate)

Everything is computed in float32 and rounded once. The backward pass needs only the inputs and
writes both gradients into one tensor, laid out as the inputs are.

Letters: t rows (all leading axes), f hidden width, c a block of it. ``x_t`` is the stride of rows
and ``f`` the width, both divided by ``UNIT``: multiplying by it again shows the compiler that rows
are aligned.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["x_t", "t_size", "f"])
def swiglu_kernel(
    x_ptr, y_ptr, x_t, t_size, f,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute a block of rows and channels."""
    f *= UNIT
    t = tl.cast(tl.program_id(1), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (t < t_size) & (c < f)
    x_ptr += t * (x_t * UNIT) + c
    gate = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + f, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + t * f + c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["dy_t", "x_t", "t_size", "f"])
def swiglu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, dy_t, x_t, t_size, f,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of rows and channels."""
    f *= UNIT
    t = tl.cast(tl.program_id(1), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (t < t_size) & (c < f)
    x_ptr += t * (x_t * UNIT) + c
    dy = tl.load(dy_ptr + t * (dy_t * UNIT) + c, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + f, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    dx_ptr += t * (2 * f) + c
    tl.store(dx_ptr, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + f, dup.to(dx_ptr.dtype.element_ty), mask=mask)
