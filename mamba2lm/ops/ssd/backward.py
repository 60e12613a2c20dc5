"""Triton kernels of the SSD's backward pass.

``states_kernel`` (forward.py) first writes, for every chunk, the state S that enters it and the
gradient dS of the state that leaves it. Given these, chunks are independent. In the transposed
orientation [s, t] (source, target), with K = B Cᵀ, E = 2^(cum_t - cum_s) for s ≤ t and the local
gradient R = x dyᵀ:

    dx   = (K ∘ E Δ_s) dy + w (B dSᵀ) + D dy         w = Δ 2^(total - cum), e = 2^cum
    dK   = Σ_heads R ∘ E Δ_s                         dB += dK C,  dC += dKᵀ B
    dB  += Σ_heads (w x) dS                          dC += Σ_heads (e dy) S
    dΔ_s = Σ_t (R ∘ K ∘ E)_st + 2^(total - cum_s) x_s·(dS B_s)   (the direct part)

The decays receive W = R ∘ K ∘ E Δ off the diagonal: log a_i collects W_st for s < i ≤ t, which is
a reverse cumulative sum of (column sums - row sums); the state a chunk starts with gives e_t
dy_t·(S C_t) to every i ≤ t and 2^total <dS, S> to every i; what a position adds to the leaving
state, w_s x_s·(dS B_s), counts for i > s, a forward sum. The two directions are kept apart so that
no large terms have to cancel. ``steps_backward_kernel`` takes the sums and goes through A, the
clamp and the softplus.

``through_states_kernel`` computes the terms with S and dS and ``within_kernel`` the others and dx:
together their accumulators would not fit the registers. A program loops over heads of one group
and keeps dB and dC in registers: few partial sums are left for a deterministic reduction, and
nothing is atomic.

Letters: as in forward.py.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.ssd.forward import MAX_GROWTH, chunk_decays, softplus

# Stands in for a step of exactly zero, whose gradient could not be divided out of W.
SMALLEST_STEP = tl.constexpr(1e-20)


@triton.jit
def through_states(
    value_ptr, value_l, value_h, key, states_ptr, cum_ptr, delta_ptr, document_ptr,
    other_ptr, sum_ptr, b, c, first, head_block, heads, chunks, inside,
    LEAVING: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of the keys over heads; store value · (state key), weighted, for each.

    Entering: values dy, keys C, states S, weights e; the last position also gets the gradient of
    the decay across the chunk, from S and the other states, dS. Leaving: x, B, dS, w.
    """
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    start = c * Q
    dtype = value_ptr.dtype.element_ty
    total = tl.zeros((Q, N), tl.float32)
    total_ptr = cum_ptr + b * heads * chunks * Q + start + Q - 1
    last = tl.load(total_ptr + tl.cast(first, tl.int64) * chunks * Q)
    for h in tl.range(first, first + head_block, num_stages=STAGES):
        row = b * heads + h
        next_last = tl.load(
            total_ptr + tl.cast(tl.minimum(h + 1, heads - 1), tl.int64) * chunks * Q
        )
        value_base = value_ptr + tl.cast(h, tl.int64) * value_h
        value = tl.load(
            value_base + (q[:, None] * value_l + p[None, :]), mask=inside[:, None], other=0.0
        )
        state_offset = ((b * chunks + c) * heads + h) * P * N
        state_block = p[:, None] * N + n[None, :]
        state = tl.load(states_ptr + state_offset + state_block)
        _, delta, from_start, to_end, across = chunk_decays(
            cum_ptr + row * chunks * Q, delta_ptr + row * chunks * Q, document_ptr,
            start, last, HAS_DOCUMENTS, Q,
        )  # fmt: skip
        last = next_last
        weight = to_end * delta if LEAVING else from_start
        product = tl.dot(key, tl.trans(state), input_precision=PRECISION)
        wide = value.to(tl.float32)
        sums = tl.sum(product * wide, axis=1)
        weighted = (wide * weight[:, None]).to(dtype)
        total = tl.dot(weighted, state, total, input_precision=PRECISION)
        if LEAVING:
            # This is what Δ gets; the decays get Δ times it.
            sums = sums * to_end
        else:
            # <S, dS> is the trace of a product, which keeps both states out of the registers.
            other = tl.load(other_ptr + state_offset + state_block)
            overlap = tl.dot(state, tl.trans(other), input_precision=PRECISION)
            overlap = across * tl.sum(tl.where(p[:, None] == p[None, :], overlap, 0.0))
            sums = sums * from_start + tl.where(q == Q - 1, overlap, 0.0)
        tl.store(sum_ptr + row * chunks * Q + start + q, sums)
    return total


@triton.jit
def through_states_kernel(
    x_ptr, B_ptr, C_ptr, dy_ptr, delta_ptr, cum_ptr, document_ptr, states_ptr, dstates_ptr,
    dB_ptr, dC_ptr, denter_ptr, dleave_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h,
    length, heads, groups, chunks, heads_per_group, head_block, batch,
    HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one chunk's gradients through its states, for a block of heads.

    Even programs of axis 0 take the states that enter, odd ones those that leave.
    """
    first = tl.program_id(0) // 2 * head_block
    c = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    g = first // heads_per_group
    split = first % heads_per_group // head_block
    wide = tl.cast(c * Q, tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, N)
    inside = c * Q + q < length
    document_ptr += b * chunks * Q
    partial = (tl.cast(split, tl.int64) * batch + b) * length + wide
    offsets = (partial * groups + g) * N + q[:, None] * (groups * N) + n[None, :]
    if tl.program_id(0) % 2 == 0:
        C_base = C_ptr + b * C_b + g * C_g + wide * C_l
        C = tl.load(C_base + (q[:, None] * C_l + n[None, :]), mask=inside[:, None], other=0.0)
        dC = through_states(
            dy_ptr + b * dy_b + wide * dy_l, dy_l, dy_h, C, states_ptr,
            cum_ptr, delta_ptr, document_ptr, dstates_ptr, denter_ptr,
            b, c, first, head_block, heads, chunks, inside,
            False, HAS_DOCUMENTS, Q, P, N, PRECISION, STAGES,
        )  # fmt: skip
        tl.store(dC_ptr + offsets, dC, mask=inside[:, None])
    else:
        B_base = B_ptr + b * B_b + g * B_g + wide * B_l
        B = tl.load(B_base + (q[:, None] * B_l + n[None, :]), mask=inside[:, None], other=0.0)
        dB = through_states(
            x_ptr + b * x_b + wide * x_l, x_l, x_h, B, dstates_ptr,
            cum_ptr, delta_ptr, document_ptr, states_ptr, dleave_ptr,
            b, c, first, head_block, heads, chunks, inside,
            True, HAS_DOCUMENTS, Q, P, N, PRECISION, STAGES,
        )  # fmt: skip
        tl.store(dB_ptr + offsets, dB, mask=inside[:, None])


@triton.jit
def within_kernel(
    x_ptr, B_ptr, C_ptr, dy_ptr, delta_ptr, cum_ptr, D_ptr, document_ptr, dstates_ptr,
    dx_ptr, dB_ptr, dC_ptr, ddelta_ptr, dcum_ptr, dD_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, dx_b, dx_l, dx_h,
    length, heads, groups, chunks, heads_per_group, head_block, batch,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of one chunk and all gradients inside it, for a block of heads."""
    first = tl.program_id(0) * head_block
    c = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    g = first // heads_per_group
    split = first % heads_per_group // head_block
    start = c * Q
    wide = tl.cast(start, tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    inside = (start + q < length)[:, None]
    dtype = x_ptr.dtype.element_ty
    document_ptr += b * chunks * Q
    B_base = B_ptr + b * B_b + g * B_g + wide * B_l
    C_base = C_ptr + b * C_b + g * C_g + wide * C_l
    B = tl.load(B_base + (q[:, None] * B_l + n[None, :]), mask=inside, other=0.0)
    C = tl.load(C_base + (q[:, None] * C_l + n[None, :]), mask=inside, other=0.0)
    allowed = q[:, None] <= q[None, :]
    if HAS_DOCUMENTS:
        document = tl.load(document_ptr + start + q)
        allowed = allowed & (document[:, None] == document[None, :])
    # K is masked once, so that the loop needs no mask; its diagonal, where E is 1, is kept apart.
    K = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    K_diagonal = tl.sum(tl.where(q[:, None] == q[None, :], K, 0.0), axis=1)
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
        x_base = x_ptr + b * x_b + wide * x_l + wide_h * x_h
        dy_base = dy_ptr + b * dy_b + wide * dy_l + wide_h * dy_h
        x = tl.load(x_base + (q[:, None] * x_l + p[None, :]), mask=inside, other=0.0)
        dy = tl.load(dy_base + (q[:, None] * dy_l + p[None, :]), mask=inside, other=0.0)
        state_offset = ((b * chunks + c) * heads + h) * P * N
        state_block = p[:, None] * N + n[None, :]
        dstate = tl.load(dstates_ptr + state_offset + state_block)
        cum, delta, _, to_end, _ = chunk_decays(
            cum_ptr + row * chunks * Q, delta_ptr + row * chunks * Q, document_ptr,
            start, last, HAS_DOCUMENTS, Q,
        )  # fmt: skip
        last = next_last

        # W holds Δ; a floor under Δ lets it be divided out again.
        step = tl.maximum(delta, SMALLEST_STEP)
        # What the masks of K and dK hide must stay finite until then.
        R = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        E = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], MAX_GROWTH)) * step[:, None]
        R *= E
        dK += R
        W = R * K
        W_rows = tl.sum(W, axis=1)
        dcum = tl.sum(W, axis=0) - W_rows
        M = (E * K).to(dtype)
        dx = tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * (to_end * delta)[:, None]
        dx = tl.dot(M, dy, dx, input_precision=PRECISION)
        R_diagonal = tl.sum(x.to(tl.float32) * dy.to(tl.float32), axis=1)
        on_diagonal = K_diagonal * delta
        if HAS_D:
            on_diagonal += tl.load(D_ptr + h).to(tl.float32)
            tl.store(dD_ptr + (b * chunks + c) * heads + h, tl.sum(R_diagonal))
        dx += on_diagonal[:, None] * dy.to(tl.float32)
        dx_base = dx_ptr + b * dx_b + wide * dx_l + wide_h * dx_h
        tl.store(
            dx_base + (q[:, None] * dx_l + p[None, :]), dx.to(dx_ptr.dtype.element_ty), mask=inside
        )
        out = row * chunks * Q + start + q
        tl.store(ddelta_ptr + out, W_rows / step + R_diagonal * K_diagonal)
        tl.store(dcum_ptr + out, dcum)

    dK = tl.where(allowed, dK, 0.0).to(dtype)
    partial = (tl.cast(split, tl.int64) * batch + b) * length + wide
    offsets = (partial * groups + g) * N + q[:, None] * (groups * N) + n[None, :]
    dB = tl.dot(dK, C, input_precision=PRECISION)
    tl.store(dB_ptr + offsets, dB, mask=inside)
    dC = tl.dot(tl.trans(dK), B, input_precision=PRECISION)
    tl.store(dC_ptr + offsets, dC, mask=inside)


@triton.jit
def steps_backward_kernel(
    dt_ptr, bias_ptr, A_ptr, delta_ptr, ddelta_ptr, dcum_ptr, dleave_ptr, denter_ptr,
    ddt_ptr, dA_ptr, dbias_ptr,
    dt_b, dt_l, dt_h, length, heads, chunks, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    Q: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Collect the gradients of Δ and of the log decays into those of dt, A and dt_bias.

    dA and ddt_bias are left as one partial sum per chunk.
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
    dcum += tl.load(denter_ptr + offsets, mask=real_head[None, :], other=0.0)
    earlier = (q > 0)[:, None] & real_head[None, :]
    ddelta += tl.load(dleave_ptr + offsets, mask=valid, other=0.0)
    dleave = tl.load(dleave_ptr + offsets - 1, mask=earlier, other=0.0)
    dleave *= tl.load(delta_ptr + offsets - 1, mask=earlier, other=0.0)
    dlog_a = tl.cumsum(dcum, axis=0, reverse=True) + tl.cumsum(dleave, axis=0)

    A = tl.load(A_ptr + h, mask=real_head, other=0.0).to(tl.float32)
    gradient = tl.where(valid, ddelta + dlog_a * A[None, :], 0.0)
    base = b * dt_b + tl.cast(c, tl.int64) * Q * dt_l
    v = tl.load(dt_ptr + base + (q[:, None] * dt_l + h[None, :]) * dt_h, mask=valid, other=0.0)
    v = v.to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=real_head, other=0.0).to(tl.float32)[None, :]
    if CLAMP:
        # Δ was clamped where it sits on a bound; like torch, the bound itself passes the gradient.
        step = softplus(v) if SOFTPLUS else v
        gradient = tl.where((step >= low) & (step <= high), gradient, 0.0)
    if SOFTPLUS:
        gradient *= 1.0 / (1.0 + tl.exp(-v))
    out = ((b * length + position[:, None]) * heads) + h[None, :]
    tl.store(ddt_ptr + out, gradient.to(ddt_ptr.dtype.element_ty), mask=valid)
    partial = (b * chunks + c) * heads + h
    tl.store(dA_ptr + partial, tl.sum(dlog_a * delta, axis=0), mask=real_head)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, tl.sum(gradient, axis=0), mask=real_head)


@triton.jit
def reduce_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr, size, splits,
    SECOND: tl.constexpr, THIRD: tl.constexpr, BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum partial[k, splits, size] over its splits, in a fixed order, into the k-th output.

    SECOND and THIRD say whether those outputs are wanted.
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
    if k == 0:
        tl.store(first_ptr + i, out.to(first_ptr.dtype.element_ty), mask=i < size)
    if SECOND and k == 1:
        tl.store(second_ptr + i, out.to(second_ptr.dtype.element_ty), mask=i < size)
    if THIRD and k == 2:
        tl.store(third_ptr + i, out.to(third_ptr.dtype.element_ty), mask=i < size)
