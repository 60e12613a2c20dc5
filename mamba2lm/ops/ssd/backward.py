"""Triton kernels of the SSD's backward pass.

``states_kernel`` (forward.py) first writes, for every chunk, the state S that enters it and the
gradient dS of the state that leaves it. Given these, chunks are independent. In the transposed
orientation [s, t] (source, target), with K = B Cᵀ, E = 2^(cum_t - cum_s) for s ≤ t and the local
gradient G = x dyᵀ:

    dx   = (K ∘ E Δ_s) dy + w (B dSᵀ) + D dy         w = Δ 2^(total - cum), e = 2^cum
    dK   = Σ_heads G ∘ E Δ_s                         dB += dK C,  dC += dKᵀ B
    dB  += Σ_heads (w x) dS                          dC += Σ_heads (e dy) S
    dΔ_s = Σ_t (G ∘ K ∘ E)_st + 2^(total - cum_s) x_s·(dS B_s)   (the direct part)

The decays receive W = G ∘ K ∘ E Δ off the diagonal: log a_i collects W_st for s < i ≤ t, which is
a reverse cumulative sum of (column sums - row sums); the state a chunk starts with gives e_t
dy_t·(S C_t) to every i ≤ t and 2^total <dS, S> to every i; what a position adds to the leaving
state, w_s x_s·(dS B_s), counts for i > s, a forward sum. The two directions are kept apart so that
no large terms have to cancel. ``steps_backward_kernel`` takes the sums and goes through A, the
clamp and the softplus.

``through_states_kernel`` computes the terms with S and dS and ``within_kernel`` the others and dx:
together their accumulators would not fit the registers. A program loops over heads of one group
and keeps dB and dC in registers: few partial sums are left for a deterministic reduction, and
nothing is atomic. Row weights (e, w) are applied to products, never to operands, so that x, dy and
the states go from memory to the matrix units without passing through registers; for the same
reason the skip D and the diagonal of K are part of a matrix, and x·dy is the diagonal of G.

Letters: as in forward.py.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.ssd.forward import (
    MAX_GROWTH,
    causal_mask,
    chunk_decays,
    decay_across,
    load_rows,
    softplus,
)

# Stands in for a step of exactly zero, whose gradient could not be divided out of W.
SMALLEST_STEP = tl.constexpr(1e-20)


@triton.jit
def through_states(
    value_ptr, value_l, value_h, key, states_ptr, cum_ptr, delta_ptr, document_ptr,
    other_ptr, sum_ptr, b, c, n, first, head_block, heads, chunks, left,
    LEAVING: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of the keys over heads; store what each head's decays receive.

    With V = value · state, (q, n), the keys' gradient is weight V and the sums are its products
    with the keys. Entering: values dy, keys C, states S, weights e; the last position also gets
    the gradient of the decay across the chunk, from S and the other states, dS. Leaving: x, B, dS,
    w; the sums leave out the Δ in w. All is restricted to the columns n of the state.
    """
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    start = c * Q
    total = tl.zeros((Q, N_BLOCK), tl.float32)
    total_ptr = cum_ptr + b * heads * chunks * Q + start + Q - 1
    last = tl.load(total_ptr + tl.cast(first, tl.int64) * chunks * Q)
    for h in tl.range(first, first + head_block, num_stages=STAGES):
        row = b * heads + h
        next_last = tl.load(
            total_ptr + tl.cast(tl.minimum(h + 1, heads - 1), tl.int64) * chunks * Q
        )
        value = load_rows(value_ptr + tl.cast(h, tl.int64) * value_h, value_l, p, left, Q)
        state_offset = ((b * chunks + c) * heads + h) * P * N
        state_block = p[:, None] * N + n[None, :]
        state = tl.load(states_ptr + state_offset + state_block)
        _, delta, from_start, to_end = chunk_decays(
            cum_ptr + row * chunks * Q, delta_ptr + row * chunks * Q, document_ptr,
            start, last, HAS_DOCUMENTS, Q,
        )  # fmt: skip
        V = tl.dot(value, state.to(value.dtype), input_precision=PRECISION)
        sums = tl.sum(V * key.to(tl.float32), axis=1)
        if LEAVING:
            total += V * (to_end * delta)[:, None]
            sums = sums * to_end
        else:
            total += V * from_start[:, None]
            other = tl.load(other_ptr + state_offset + state_block)
            if state.dtype == tl.float32:
                overlap = tl.sum(state * other)
            else:
                # <S, dS> is the trace of a product, which keeps both out of the registers.
                overlap = tl.dot(state, tl.trans(other), input_precision=PRECISION)
                overlap = tl.sum(tl.where(p[:, None] == p[None, :], overlap, 0.0))
            overlap *= decay_across(document_ptr, start, last, HAS_DOCUMENTS, Q)
            sums = sums * from_start + tl.where(q == Q - 1, overlap, 0.0)
        last = next_last
        tl.store(sum_ptr + row * chunks * Q + start + q, sums)
    return total


@triton.jit
def through_states_kernel(
    x_ptr, B_ptr, C_ptr, dy_ptr, delta_ptr, cum_ptr, document_ptr, states_ptr, dstates_ptr,
    dB_ptr, dC_ptr, denter_ptr, dleave_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h,
    length, heads, groups, chunks, heads_per_group, head_block, batch,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one chunk's gradients through its states, for a block of heads and of columns n.

    Programs of axis 0 are (heads, columns, direction): even ones take the states that enter, odd
    ones those that leave. Each block of columns writes a sum of its own for the decays.
    """
    N_BLOCKS: tl.constexpr = N // N_BLOCK
    pid = tl.program_id(0) // 2
    first = pid // N_BLOCKS * head_block
    column = pid % N_BLOCKS
    c = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    g = first // heads_per_group
    split = first % heads_per_group // head_block
    wide = tl.cast(c * Q, tl.int64)
    left = length - c * Q
    q = tl.arange(0, Q)
    n = column * N_BLOCK + tl.arange(0, N_BLOCK)
    inside = (q < left)[:, None]
    sums_offset = tl.cast(column, tl.int64) * batch * heads * chunks * Q
    document_ptr += b * chunks * Q
    partial = (tl.cast(split, tl.int64) * batch + b) * length + wide
    offsets = (partial * groups + g) * N + q[:, None] * (groups * N) + n[None, :]
    if tl.program_id(0) % 2 == 0:
        C = load_rows(C_ptr + b * C_b + g * C_g + wide * C_l, C_l, n, left, Q)
        dC = through_states(
            dy_ptr + b * dy_b + wide * dy_l, dy_l, dy_h, C, states_ptr,
            cum_ptr, delta_ptr, document_ptr, dstates_ptr, denter_ptr + sums_offset,
            b, c, n, first, head_block, heads, chunks, left,
            False, HAS_DOCUMENTS, Q, P, N, N_BLOCK, PRECISION, STAGES,
        )  # fmt: skip
        tl.store(dC_ptr + offsets, dC, mask=inside)
    else:
        B = load_rows(B_ptr + b * B_b + g * B_g + wide * B_l, B_l, n, left, Q)
        dB = through_states(
            x_ptr + b * x_b + wide * x_l, x_l, x_h, B, dstates_ptr,
            cum_ptr, delta_ptr, document_ptr, states_ptr, dleave_ptr + sums_offset,
            b, c, n, first, head_block, heads, chunks, left,
            True, HAS_DOCUMENTS, Q, P, N, N_BLOCK, PRECISION, STAGES,
        )  # fmt: skip
        tl.store(dB_ptr + offsets, dB, mask=inside)


@triton.jit
def within_kernel(
    x_ptr, B_ptr, C_ptr, dy_ptr, delta_ptr, cum_ptr, D_ptr, document_ptr, dstates_ptr,
    dx_ptr, dB_ptr, dC_ptr, ddelta_ptr, dcum_ptr, skip_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, dx_b, dx_l, dx_h,
    length, heads, groups, chunks, heads_per_group, head_block, batch,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of one chunk and all gradients inside it, for a block of heads."""
    first = tl.program_id(0) * head_block
    c = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    g = first // heads_per_group
    split = first % heads_per_group // head_block
    start = c * Q
    left = length - start
    wide = tl.cast(start, tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    diagonal = q[:, None] == q[None, :]
    inside = (q < left)[:, None]
    dtype = x_ptr.dtype.element_ty
    document_ptr += b * chunks * Q
    B = load_rows(B_ptr + b * B_b + g * B_g + wide * B_l, B_l, n, left, Q)
    C = load_rows(C_ptr + b * C_b + g * C_g + wide * C_l, C_l, n, left, Q)
    # K is masked once, so that the loop needs no mask; its diagonal, where E is 1, is kept apart.
    allowed = tl.trans(causal_mask(document_ptr, start, HAS_DOCUMENTS, Q))
    K = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    K_diagonal = tl.sum(tl.where(diagonal, K, 0.0), axis=1)
    K = tl.where(allowed & (q[:, None] != q[None, :]), K, 0.0)
    dK = tl.zeros((Q, Q), tl.float32)
    total_ptr = cum_ptr + b * heads * chunks * Q + start + Q - 1
    last = tl.load(total_ptr + tl.cast(first, tl.int64) * chunks * Q)
    for h in tl.range(first, first + head_block, num_stages=STAGES):
        row = b * heads + h
        next_last = tl.load(
            total_ptr + tl.cast(tl.minimum(h + 1, heads - 1), tl.int64) * chunks * Q
        )
        wide_h = tl.cast(h, tl.int64)
        x = load_rows(x_ptr + b * x_b + wide * x_l + wide_h * x_h, x_l, p, left, Q)
        dy = load_rows(dy_ptr + b * dy_b + wide * dy_l + wide_h * dy_h, dy_l, p, left, Q)
        state_offset = ((b * chunks + c) * heads + h) * P * N
        dstate = tl.load(dstates_ptr + state_offset + (p[:, None] * N + n[None, :]))
        cum, delta, _, to_end = chunk_decays(
            cum_ptr + row * chunks * Q, delta_ptr + row * chunks * Q, document_ptr,
            start, last, HAS_DOCUMENTS, Q,
        )  # fmt: skip
        last = next_last

        # W holds Δ; a floor under Δ lets it be divided out again.
        step = tl.maximum(delta, SMALLEST_STEP)
        # What the masks of K and dK hide must stay finite until then.
        E = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], MAX_GROWTH)) * step[:, None]
        G = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        skip = tl.sum(tl.where(diagonal, G, 0.0), axis=1)
        G *= E
        dK += G
        W = G * K
        W_rows = tl.sum(W, axis=1)
        dcum = tl.sum(W, axis=0) - W_rows
        on_diagonal = K_diagonal * delta
        if HAS_D:
            on_diagonal += tl.load(D_ptr + h).to(tl.float32)
        M = tl.where(diagonal, on_diagonal[:, None], E * K).to(dtype)
        dx = tl.dot(B, tl.trans(dstate.to(dtype)), input_precision=PRECISION)
        dx *= (to_end * delta)[:, None]
        dx = tl.dot(M, dy, dx, input_precision=PRECISION)
        dx_base = dx_ptr + b * dx_b + wide * dx_l + wide_h * dx_h
        tl.store(
            dx_base + (q[:, None] * dx_l + p[None, :]), dx.to(dx_ptr.dtype.element_ty), mask=inside
        )
        out = row * chunks * Q + start + q
        tl.store(ddelta_ptr + out, W_rows / step + skip * K_diagonal)
        tl.store(dcum_ptr + out, dcum)
        if HAS_D:
            tl.store(skip_ptr + out, skip)

    dK = tl.where(allowed, dK, 0.0).to(dtype)
    partial = (tl.cast(split, tl.int64) * batch + b) * length + wide
    offsets = (partial * groups + g) * N + q[:, None] * (groups * N) + n[None, :]
    dB = tl.dot(dK, C, input_precision=PRECISION)
    tl.store(dB_ptr + offsets, dB, mask=inside)
    dC = tl.dot(tl.trans(dK), B, input_precision=PRECISION)
    tl.store(dC_ptr + offsets, dC, mask=inside)


@triton.jit
def gate_backward_kernel(
    dout_ptr, pre_ptr, z_ptr, dy_ptr, dz_ptr,
    dout_b, dout_l, dout_h, z_b, z_l, z_h, y_b, y_l, y_h, length,
    Q: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of y silu(z) into those of y and z, which lie as y does."""
    h = tl.cast(tl.program_id(1), tl.int64)
    b = tl.cast(tl.program_id(2), tl.int64)
    t = tl.cast(tl.program_id(0), tl.int64) * Q + tl.arange(0, Q)
    p = tl.arange(0, P)
    mask = (t < length)[:, None]
    dout_at = dout_ptr + b * dout_b + h * dout_h + t[:, None] * dout_l + p[None, :]
    z_at = z_ptr + b * z_b + h * z_h + t[:, None] * z_l + p[None, :]
    y_at = b * y_b + h * y_h + t[:, None] * y_l + p[None, :]
    dout = tl.load(dout_at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    dy = dout * z * sigmoid
    dz = dout * pre * sigmoid * (1.0 + z * (1.0 - sigmoid))
    tl.store(dy_ptr + y_at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + y_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def steps_backward_kernel(
    dt_ptr, bias_ptr, A_ptr, delta_ptr, ddelta_ptr, dcum_ptr, dleave_ptr, denter_ptr, skip_ptr,
    ddt_ptr, dA_ptr, dbias_ptr, dD_ptr,
    dt_b, dt_l, dt_h, ddt_t, length, heads, chunks, sums_size, low, high,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    Q: tl.constexpr, HEAD_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Collect the gradients of Δ and of the log decays into those of dt, A and dt_bias.

    dA, ddt_bias and dD (from the sums x·dy) are left as one partial sum per chunk. dleave and
    denter come as COLUMNS partial sums, ``sums_size`` apart; rows of ddt lie ``ddt_t`` apart.
    """
    c = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    q = tl.arange(0, Q)
    h = tl.program_id(2) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    position = c * Q + q
    real_head = h < heads
    valid = (position < length)[:, None] & real_head[None, :]
    offsets = (b * heads + h[None, :]) * (chunks * Q) + position[:, None]
    delta = tl.load(delta_ptr + offsets, mask=valid, other=0.0)
    ddelta = tl.load(ddelta_ptr + offsets, mask=valid, other=0.0)
    dcum = tl.load(dcum_ptr + offsets, mask=real_head[None, :], other=0.0)
    earlier = (q > 0)[:, None] & real_head[None, :]
    dleave = tl.zeros((Q, HEAD_BLOCK), tl.float32)
    for _ in tl.static_range(COLUMNS):
        dcum += tl.load(denter_ptr + offsets, mask=real_head[None, :], other=0.0)
        ddelta += tl.load(dleave_ptr + offsets, mask=valid, other=0.0)
        dleave += tl.load(dleave_ptr + offsets - 1, mask=earlier, other=0.0)
        denter_ptr += sums_size
        dleave_ptr += sums_size
    dleave *= tl.load(delta_ptr + offsets - 1, mask=earlier, other=0.0)
    dlog_a = tl.cumsum(dcum, axis=0, reverse=True) + tl.cumsum(dleave, axis=0)

    A = tl.load(A_ptr + h, mask=real_head, other=0.0).to(tl.float32)
    gradient = tl.where(valid, ddelta + dlog_a * A[None, :], 0.0)
    base = b * dt_b + tl.cast(c, tl.int64) * Q * dt_l
    v = tl.load(dt_ptr + base + q[:, None] * dt_l + h[None, :] * dt_h, mask=valid, other=0.0)
    v = v.to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=real_head, other=0.0).to(tl.float32)[None, :]
    if CLAMP:
        # Δ was clamped where it sits on a bound; like torch, the bound itself passes the gradient.
        step = softplus(v) if SOFTPLUS else v
        gradient = tl.where((step >= low) & (step <= high), gradient, 0.0)
    if SOFTPLUS:
        gradient *= 1.0 / (1.0 + tl.exp(-v))
    out = (b * length + position[:, None]) * ddt_t + h[None, :]
    tl.store(ddt_ptr + out, gradient.to(ddt_ptr.dtype.element_ty), mask=valid)
    partial = (b * chunks + c) * heads + h
    tl.store(dA_ptr + partial, tl.sum(dlog_a * delta, axis=0), mask=real_head)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, tl.sum(gradient, axis=0), mask=real_head)
    if HAS_D:
        skip = tl.load(skip_ptr + offsets, mask=valid, other=0.0)
        tl.store(dD_ptr + partial, tl.sum(skip, axis=0), mask=real_head)


@triton.jit
def reduce_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr, size, splits, out_t,
    SECOND: tl.constexpr, THIRD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum partial[k, splits, size] over its splits, in a fixed order, into the k-th output.

    SECOND and THIRD say whether those outputs are wanted. Outputs are rows of WIDTH elements, which
    lie ``out_t`` apart.
    """
    k = tl.program_id(1)
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLIT_BLOCK)
    base = partial_ptr + tl.cast(k, tl.int64) * splits * size
    total = tl.zeros((SPLIT_BLOCK, BLOCK), tl.float32)
    for start in range(0, splits, SPLIT_BLOCK):
        row = tl.cast(start + s, tl.int64)[:, None]
        mask = (row < splits) & (i < size)[None, :]
        total += tl.load(base + row * size + i[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    at = i // WIDTH * out_t + i % WIDTH
    if k == 0:
        tl.store(first_ptr + at, out.to(first_ptr.dtype.element_ty), mask=i < size)
    if SECOND and k == 1:
        tl.store(second_ptr + at, out.to(second_ptr.dtype.element_ty), mask=i < size)
    if THIRD and k == 2:
        tl.store(third_ptr + at, out.to(third_ptr.dtype.element_ty), mask=i < size)
