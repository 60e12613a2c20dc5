"""Triton kernel of the causal convolution of one token: y = silu(bias + Σ_k weight_k window_k).

The window is the w-1 inputs before and the new one; the state moves on by one in the same pass. A
thread owns a channel of a row, so a state may be overwritten.

Letters: b batch, d channels, w conv width.
"""

# Triton compiles the body below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (no unpacking into tuples there either)

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.linear_step.step import wait_for_previous
from mamba2lm.ops.selective_scan.forward import sigmoid


@triton.jit(do_not_specialize=["d_size"])
def convolve_step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, new_ptr, x_b, state_b, y_b, new_b, d_size,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Convolve ``BLOCK`` channels of a row."""
    b = tl.cast(tl.program_id(1), tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = d < d_size
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + d * W + j, mask=real, other=0.0).to(tl.float32),)
    wait_for_previous(CHAIN)
    window = ()
    for j in tl.static_range(W - 1):
        window = window + (tl.load(state_ptr + b * state_b + j * d_size + d, mask=real, other=0.0),)
    fresh = tl.load(x_ptr + b * x_b + d, mask=real, other=0.0)
    # All threads that hold a channel must have read it before one writes.
    tl.debug_barrier()
    y = fresh.to(tl.float32) * taps[W - 1]
    for j in tl.static_range(W - 1):
        y += window[j].to(tl.float32) * taps[j]
        if j > 0:
            tl.store(new_ptr + b * new_b + (j - 1) * d_size + d, window[j], mask=real)
    if W > 1:
        last = fresh.to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + b * new_b + (W - 2) * d_size + d, last, mask=real)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=real, other=0.0).to(tl.float32)
    if SILU:
        y *= sigmoid(y)
    tl.store(y_ptr + b * y_b + d, y.to(y_ptr.dtype.element_ty), mask=real)
