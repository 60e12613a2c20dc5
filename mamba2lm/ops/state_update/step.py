"""Triton kernels of one token of both recurrences.

    Mamba-2: h ← exp(Δ A) h + Δ x Bᵀ,  y = h C + D x     one Δ and A a head, B and C a group
    Mamba-1: h ← exp(Δ A) h + Δ x Bᵀ,  y = h C + D x     Δ a channel, A a channel and state

A step reads and writes the whole state and little else, so each is one pass over it: a program
loads a block of rows of the state, advances it, stores it and leaves y, gated by SiLU(z). Sums are
in float32 whatever dtype the state is kept in.

``CHAIN``: see ``linear_step/step.py``. With ``EARLY`` the state too is loaded before waiting, which
is right where the previous kernel on the stream does not write it.

Letters: b batch, h heads, p head dim, g groups, d channels, n state. ``…_b`` is a tensor's stride
of rows; all else is contiguous.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.linear_step.step import wait_for_previous
from mamba2lm.ops.selective_scan.forward import LOG2_E, sigmoid, step_size


@triton.jit
def rate(A, LOGARITHM: tl.constexpr):
    """A log₂e, of an A that may be kept as log(−A)."""
    A = A.to(tl.float32)
    if LOGARITHM:
        A = -tl.exp2(A * LOG2_E)
    return A * LOG2_E


@triton.jit(do_not_specialize=["h_size", "heads_per_group"])
def ssd_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, new_ptr,
    norm_ptr, squares_ptr,
    state_b, x_b, dt_b, B_b, C_b, z_b, new_b, h_size, heads_per_group, low, high,
    HAS_D: tl.constexpr, D_WIDE: tl.constexpr, NORMED: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOGARITHM: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Advance ``BLOCK_P`` rows of the state of a head of a row.

    With ``NORMED`` y meets the norm's weight, and its squares before that are summed.
    """
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // BLOCKS
    b = tl.cast(tl.program_id(1), tl.int64)
    p = (tl.program_id(0) % BLOCKS) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    real_p, real_n = p < P, n < N
    inside = real_p[:, None] & real_n[None, :]
    place = (h * P + p)[:, None] * N + n[None, :]
    state_ptrs = state_ptr + b * state_b + place
    if EARLY:
        state = tl.load(state_ptrs, mask=inside, other=0.0).to(tl.float32)
    A = rate(tl.load(A_ptr + h), LOGARITHM)
    if NORMED:
        norm = tl.load(norm_ptr + h * P + p, mask=real_p, other=0.0).to(tl.float32)
    wait_for_previous(CHAIN)
    if not EARLY:
        state = tl.load(state_ptrs, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_b + h).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h).to(tl.float32)
    step = step_size(dt, low, high, SOFTPLUS, CLAMP)
    x = tl.load(x_ptr + b * x_b + h * P + p, mask=real_p, other=0.0).to(tl.float32)
    g = h // heads_per_group
    B = tl.load(B_ptr + b * B_b + g * N + n, mask=real_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + g * N + n, mask=real_n, other=0.0).to(tl.float32)
    state = state * tl.exp2(step * A) + (step * x)[:, None] * B[None, :]
    tl.store(new_ptr + b * new_b + place, state.to(new_ptr.dtype.element_ty), mask=inside)
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        if D_WIDE:
            y += tl.load(D_ptr + h * P + p, mask=real_p, other=0.0).to(tl.float32) * x
        else:
            y += tl.load(D_ptr + h).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + b * z_b + h * P + p, mask=real_p, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    if NORMED:
        place = b * (h_size * BLOCKS) + tl.program_id(0)
        tl.store(squares_ptr + place, tl.sum(tl.where(real_p, y * y, 0.0), axis=0))
        y *= norm
    y_ptrs = y_ptr + (b * h_size + h) * P + p
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=real_p)


@triton.jit(do_not_specialize=["d_size"])
def selective_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, new_ptr,
    state_b, x_b, dt_b, B_b, C_b, z_b, new_b, d_size, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOGARITHM: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Advance ``BLOCK_D`` channels of a row."""
    b = tl.cast(tl.program_id(1), tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    real_d, real_n = d < d_size, n < N
    inside = real_d[:, None] & real_n[None, :]
    place = d[:, None] * N + n[None, :]
    state_ptrs = state_ptr + b * state_b + place
    if EARLY:
        state = tl.load(state_ptrs, mask=inside, other=0.0).to(tl.float32)
    A = rate(tl.load(A_ptr + place, mask=inside, other=0.0), LOGARITHM)
    wait_for_previous(CHAIN)
    if not EARLY:
        state = tl.load(state_ptrs, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_b + d, mask=real_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + d, mask=real_d, other=0.0).to(tl.float32)
    step = step_size(dt, low, high, SOFTPLUS, CLAMP)
    x = tl.load(x_ptr + b * x_b + d, mask=real_d, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_b + n, mask=real_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + n, mask=real_n, other=0.0).to(tl.float32)
    state = state * tl.exp2(step[:, None] * A) + (step * x)[:, None] * B[None, :]
    tl.store(new_ptr + b * new_b + place, state.to(new_ptr.dtype.element_ty), mask=inside)
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        y += tl.load(D_ptr + d, mask=real_d, other=0.0).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + b * z_b + d, mask=real_d, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + b * d_size + d, y.to(y_ptr.dtype.element_ty), mask=real_d)
