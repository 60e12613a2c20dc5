"""Triton kernels of the SSD's forward pass (and of everything that both passes share).

With Δ the step sizes, cum the inclusive sum of Δ A log₂e inside a chunk, S the state that enters
the chunk and L_ts = 2^(cum_t - cum_s) for s ≤ t, a chunk of q positions computes

    y_t  = Σ_s (C_t·B_s) L_ts Δ_s x_s  +  2^cum_t S C_t  +  D x_t
    S'   = 2^total S  +  Σ_s 2^(total - cum_s) Δ_s x_s B_sᵀ

Two schedules compute it. *Fused*: one program walks all chunks of one head with S in registers, and
nothing but the outputs reaches memory; it needs many heads to fill a GPU. *Chunked*:
``states_kernel`` walks the chunks for the sake of the states alone and writes the one that enters
each chunk; ``scan_kernel`` then treats all chunks at once.

Where x does not pass through registers (DIRECT, and in the chunked schedule), the skip D x is part
of the diagonal of the matrix that multiplies x.

Decays are exponentials of differences taken where they are at most zero, masked before the
exponential; a document boundary makes a decay 0 by comparing document ordinals.

Letters: b batch, l length, h heads, p head dim, g groups, n state, c chunks, q position in chunk
(t as a target, s as a source). ``…_l`` and the like name the stride of that axis.

    name       shape            what
    delta      (b, h, c·q)      Δ, float32, 0 in the padding
    cum        (b, h, c·q)      cumulative log₂ decay inside a chunk, float32
    document   (b, c·q)         document ordinals, int32; padding continues the last
    states     (b, c, h, p, n)  state entering each chunk, in the compute dtype or float32
    pre        (b, l, h, p)     y before the gate silu(z), kept for the backward pass
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

# Kernels that mask a product of matrices once, outside a loop, bound the exponents that the mask
# hides: 2^64 times anything reasonable is finite, and no allowed exponent of a decay is positive.
MAX_GROWTH = tl.constexpr(64.0)


@triton.jit
def softplus(v):
    """log(1 + eᵛ) with full relative precision at both ends (Kahan's correction of log(1 + e))."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    exact = u == 1.0
    log1p = tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def steps_kernel(
    dt_ptr, bias_ptr, A_ptr, delta_ptr, cum_ptr,
    dt_b, dt_l, dt_h, length, heads, chunks, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    Q: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn raw step sizes into Δ and the chunk-wise cumulative log₂ decay, heads before length."""
    c = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    q = tl.arange(0, Q)
    h = tl.program_id(2) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    position = c * Q + q
    valid = (position < length)[:, None] & (h < heads)[None, :]
    base = dt_ptr + b * dt_b + tl.cast(c, tl.int64) * Q * dt_l
    v = tl.load(base + q[:, None] * dt_l + h[None, :] * dt_h, mask=valid, other=0.0)
    v = v.to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        v = softplus(v)
    if CLAMP:
        v = tl.minimum(tl.maximum(v, low), high)
    delta = tl.where(valid, v, 0.0)
    cum = tl.cumsum(delta * (A * 1.4426950408889634)[None, :], axis=0)
    out = (b * heads + h[None, :]) * (chunks * Q) + position[:, None]
    tl.store(delta_ptr + out, delta, mask=(h < heads)[None, :])
    tl.store(cum_ptr + out, cum, mask=(h < heads)[None, :])


@triton.jit
def load_rows(base, stride, columns, left, Q: tl.constexpr):
    """Load the positions of a chunk as rows; ``left`` of them exist, the others are 0."""
    t = tl.arange(0, Q)
    return tl.load(
        base + (t[:, None] * stride + columns[None, :]), mask=(t < left)[:, None], other=0.0
    )


@triton.jit
def chunk_decays(
    cum_ptr, delta_ptr, document_ptr, start, total,
    HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Load cum and Δ of a chunk and form the decays from its start and to its end.

    ``total`` is the last cum, which loops load one turn early: nothing else hides its latency.
    """
    t = start + tl.arange(0, Q)
    cum = tl.load(cum_ptr + t)
    delta = tl.load(delta_ptr + t)
    from_start = tl.exp2(cum)
    to_end = tl.exp2(total - cum)
    if HAS_DOCUMENTS:
        document = tl.load(document_ptr + t)
        before = tl.load(document_ptr + tl.maximum(start - 1, 0))
        last = tl.load(document_ptr + start + Q - 1)
        from_start = tl.where(document == before, from_start, 0.0)
        to_end = tl.where(document == last, to_end, 0.0)
    return cum, delta, from_start, to_end


@triton.jit
def decay_across(document_ptr, start, total, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr):
    """Return how much of the state that enters a chunk is in the one that leaves it."""
    across = tl.exp2(total)
    if HAS_DOCUMENTS:
        before = tl.load(document_ptr + tl.maximum(start - 1, 0))
        last = tl.load(document_ptr + start + Q - 1)
        across = tl.where(before == last, across, 0.0)
    return across


@triton.jit
def causal_mask(document_ptr, start, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr):
    """Return (q target, q source): whether the source is not later and of the same document."""
    t = tl.arange(0, Q)
    allowed = t[:, None] >= t[None, :]
    if HAS_DOCUMENTS:
        document = tl.load(document_ptr + start + t)
        allowed = allowed & (document[:, None] == document[None, :])
    return allowed


@triton.jit
def unit_matrix(dtype: tl.constexpr, Q: tl.constexpr):
    """Return the (q, q) unit matrix."""
    q = tl.arange(0, Q)
    return tl.where(q[:, None] == q[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def weighted_columns(rows, weight, unit, DIRECT: tl.constexpr, PRECISION: tl.constexpr):
    """Return (weight ∘ rows)ᵀ in the dtype of the rows, whose positions are its columns.

    DIRECT: transposed by a product with the unit matrix, which is exact. So the rows go from memory
    to the matrix units, loaded ahead, and come out where the next product takes its operand; else
    they pass through registers and shared memory once more.
    """
    if DIRECT:
        turned = tl.dot(tl.trans(rows), unit, input_precision=PRECISION)
        weighted = (turned * weight[None, :]).to(rows.dtype)
    else:
        weighted = tl.trans((rows.to(tl.float32) * weight[:, None]).to(rows.dtype))
    return weighted


@triton.jit
def store_output(
    y, y_base, pre_base, y_l, z_base, z_l, p, left, HAS_Z: tl.constexpr, Q: tl.constexpr
):
    """Store a chunk's outputs; with a gate also what they were before it."""
    t = tl.arange(0, Q)
    mask = (t < left)[:, None]
    offsets = t[:, None] * y_l + p[None, :]
    if HAS_Z:
        tl.store(pre_base + offsets, y.to(pre_base.dtype.element_ty), mask=mask)
        z = tl.load(z_base + (t[:, None] * z_l + p[None, :]), mask=mask, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_base + offsets, y.to(y_base.dtype.element_ty), mask=mask)


@triton.jit
def fused_kernel(
    x_ptr, B_ptr, C_ptr, z_ptr, delta_ptr, cum_ptr, D_ptr, document_ptr, initial_ptr,
    y_ptr, pre_ptr, final_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, y_b, y_l, y_h,
    length, heads, chunks, heads_per_group,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_BLOCK: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one head, the state (a block of p rows) staying in registers."""
    P_BLOCKS: tl.constexpr = P // P_BLOCK
    pid = tl.program_id(0)
    row = tl.cast(pid // P_BLOCKS, tl.int64)  # batch and head
    b = row // heads
    h = row % heads
    g = h // heads_per_group
    q = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = (pid % P_BLOCKS) * P_BLOCK + tl.arange(0, P_BLOCK)
    dtype = x_ptr.dtype.element_ty
    cum_ptr += row * chunks * Q
    delta_ptr += row * chunks * Q
    document_ptr += b * chunks * Q
    x_ptr += b * x_b + h * x_h
    z_ptr += b * z_b + h * z_h
    y_ptr += b * y_b + h * y_h
    pre_ptr += b * y_b + h * y_h
    B_ptr += b * B_b + g * B_g
    C_ptr += b * C_b + g * C_g
    state_offsets = row * P * N + p[:, None] * N + n[None, :]
    if HAS_INITIAL:
        state = tl.load(initial_ptr + state_offsets).to(tl.float32)
    else:
        state = tl.zeros((P_BLOCK, N), tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + h).to(tl.float32)
    rounded = state.to(dtype)
    unit = unit_matrix(dtype, Q)
    total = tl.load(cum_ptr + Q - 1)
    for c in range(0, chunks):
        start = c * Q
        wide = tl.cast(start, tl.int64)
        left = length - start
        next_total = tl.load(cum_ptr + tl.minimum(c + 1, chunks - 1) * Q + Q - 1)
        C = load_rows(C_ptr + wide * C_l, C_l, n, left, Q)
        B = load_rows(B_ptr + wide * B_l, B_l, n, left, Q)
        x = load_rows(x_ptr + wide * x_l, x_l, p, left, Q)
        cum, delta, from_start, to_end = chunk_decays(
            cum_ptr, delta_ptr, document_ptr, start, total, HAS_DOCUMENTS, Q
        )
        across = decay_across(document_ptr, start, total, HAS_DOCUMENTS, Q)
        total = next_total
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        allowed = causal_mask(document_ptr, start, HAS_DOCUMENTS, Q)
        exponent = tl.where(allowed, cum[:, None] - cum[None, :], float("-inf"))
        M = scores * tl.exp2(exponent) * delta[None, :]
        if HAS_D and DIRECT:
            M = tl.where(q[:, None] == q[None, :], M + D, M)
        if not DIRECT:
            rounded = state.to(dtype)
        y = tl.dot(C, tl.trans(rounded), input_precision=PRECISION) * from_start[:, None]
        y = tl.dot(M.to(dtype), x, y, input_precision=PRECISION)
        wx = weighted_columns(x, to_end * delta, unit, DIRECT, PRECISION)
        state = tl.dot(wx, B, state * across, input_precision=PRECISION)
        if DIRECT:
            # Here, so that this product ends before the next turn's begins: ptxas starts products
            # one by one where one that is under way overlaps with the making of another's sum.
            rounded = state.to(dtype)
        elif HAS_D:
            y += D * x.to(tl.float32)
        store_output(
            y, y_ptr + wide * y_l, pre_ptr + wide * y_l, y_l, z_ptr + wide * z_l, z_l,
            p, left, HAS_Z, Q,
        )  # fmt: skip
    tl.store(final_ptr + state_offsets, state)


@triton.jit
def pass_states(
    value_ptrs, value_l, key_ptrs, key_l, states_ptrs, states_c, cum_ptr, delta_ptr, document_ptr,
    state, length, chunks,
    REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks for the state alone, storing it before each; return it after the last.

    Forwards the values are x and the keys B; in reverse they are dy and C, and what is passed is
    the gradient of the state that leaves a chunk.
    """
    q = tl.arange(0, Q)
    unit = unit_matrix(value_ptrs.dtype.element_ty, Q)
    total = tl.load(cum_ptr + (chunks * Q - 1 if REVERSE else Q - 1))
    for i in range(0, chunks):
        c = chunks - 1 - i if REVERSE else i
        start = c * Q
        after = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, chunks - 1)
        next_total = tl.load(cum_ptr + after * Q + Q - 1)
        wide = tl.cast(start, tl.int64)
        inside = (start + q < length)[:, None]
        value = tl.load(value_ptrs + wide * value_l, mask=inside, other=0.0)
        key = tl.load(key_ptrs + wide * key_l, mask=inside, other=0.0)
        stored = state.to(states_ptrs.dtype.element_ty)
        tl.store(states_ptrs + tl.cast(c, tl.int64) * states_c, stored)
        _, delta, from_start, to_end = chunk_decays(
            cum_ptr, delta_ptr, document_ptr, start, total, HAS_DOCUMENTS, Q
        )
        across = decay_across(document_ptr, start, total, HAS_DOCUMENTS, Q)
        total = next_total
        weight = from_start if REVERSE else to_end * delta
        weighted = weighted_columns(value, weight, unit, DIRECT, PRECISION)
        state = tl.dot(weighted, key, state * across, input_precision=PRECISION)
    return state


@triton.jit
def states_kernel(
    x_ptr, B_ptr, dy_ptr, C_ptr, delta_ptr, cum_ptr, document_ptr,
    initial_ptr, dfinal_ptr, states_ptr, dstates_ptr, final_ptr, dinitial_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, dy_b, dy_l, dy_h, C_b, C_l, C_g,
    length, heads, chunks, heads_per_group,
    BACKWARD: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the state entering every chunk; with BACKWARD also the gradient of each one leaving.

    A program owns a (p, n) block of one head's state and one direction (program axis 1).
    """
    P_BLOCKS: tl.constexpr = P // P_BLOCK
    N_BLOCKS: tl.constexpr = N // N_BLOCK
    pid = tl.program_id(0)
    row = tl.cast(pid // (P_BLOCKS * N_BLOCKS), tl.int64)
    b = row // heads
    h = row % heads
    g = h // heads_per_group
    q = tl.arange(0, Q)
    p = (pid // N_BLOCKS % P_BLOCKS) * P_BLOCK + tl.arange(0, P_BLOCK)
    n = (pid % N_BLOCKS) * N_BLOCK + tl.arange(0, N_BLOCK)
    cum_ptr += row * chunks * Q
    delta_ptr += row * chunks * Q
    document_ptr += b * chunks * Q
    block = p[:, None] * N + n[None, :]
    states_offset = b * chunks * heads * P * N + h * P * N
    states_c = tl.cast(heads, tl.int64) * P * N
    reverse = tl.program_id(1) == 1 if BACKWARD else False
    if reverse:
        if HAS_DFINAL:
            state = tl.load(dfinal_ptr + row * P * N + block).to(tl.float32)
        else:
            state = tl.zeros((P_BLOCK, N_BLOCK), tl.float32)
        state = pass_states(
            dy_ptr + b * dy_b + h * dy_h + q[:, None] * dy_l + p[None, :], dy_l,
            C_ptr + b * C_b + g * C_g + q[:, None] * C_l + n[None, :], C_l,
            dstates_ptr + states_offset + block, states_c, cum_ptr, delta_ptr, document_ptr,
            state, length, chunks, True, HAS_DOCUMENTS, Q, DIRECT, PRECISION,
        )  # fmt: skip
        if HAS_INITIAL:
            tl.store(dinitial_ptr + row * P * N + block, state)
    else:
        if HAS_INITIAL:
            state = tl.load(initial_ptr + row * P * N + block).to(tl.float32)
        else:
            state = tl.zeros((P_BLOCK, N_BLOCK), tl.float32)
        state = pass_states(
            x_ptr + b * x_b + h * x_h + q[:, None] * x_l + p[None, :], x_l,
            B_ptr + b * B_b + g * B_g + q[:, None] * B_l + n[None, :], B_l,
            states_ptr + states_offset + block, states_c, cum_ptr, delta_ptr, document_ptr,
            state, length, chunks, False, HAS_DOCUMENTS, Q, DIRECT, PRECISION,
        )  # fmt: skip
        if not BACKWARD:
            tl.store(final_ptr + row * P * N + block, state)


@triton.jit
def scan_kernel(
    x_ptr, B_ptr, C_ptr, z_ptr, delta_ptr, cum_ptr, D_ptr, document_ptr, states_ptr,
    y_ptr, pre_ptr,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, y_b, y_l, y_h,
    length, heads, chunks, heads_per_group, head_block,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one chunk for a block of heads of one group."""
    first = tl.program_id(0) * head_block
    c = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    g = first // heads_per_group
    start = c * Q
    left = length - start
    wide = tl.cast(start, tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    diagonal = q[:, None] == q[None, :]
    dtype = x_ptr.dtype.element_ty
    document_ptr += b * chunks * Q
    B = load_rows(B_ptr + b * B_b + g * B_g + wide * B_l, B_l, n, left, Q)
    C = load_rows(C_ptr + b * C_b + g * C_g + wide * C_l, C_l, n, left, Q)
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    scores = tl.where(causal_mask(document_ptr, start, HAS_DOCUMENTS, Q), scores, 0.0)
    for h in tl.range(first, first + head_block, num_stages=STAGES):
        row = b * heads + h
        wide_h = tl.cast(h, tl.int64)
        states = states_ptr + ((b * chunks + c) * heads + h) * P * N
        state = tl.load(states + (p[:, None] * N + n[None, :]))
        x = load_rows(x_ptr + b * x_b + wide * x_l + wide_h * x_h, x_l, p, left, Q)
        cum, delta, from_start, _ = chunk_decays(
            cum_ptr + row * chunks * Q, delta_ptr + row * chunks * Q, document_ptr,
            start, 0.0, HAS_DOCUMENTS, Q,
        )  # fmt: skip
        exponent = tl.minimum(cum[:, None] - cum[None, :], MAX_GROWTH)
        M = scores * tl.exp2(exponent) * delta[None, :]
        if HAS_D:
            M = tl.where(diagonal, M + tl.load(D_ptr + h).to(tl.float32), M)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
        y = tl.dot(M.to(dtype), x, y, input_precision=PRECISION)
        y_offset = b * y_b + wide * y_l + wide_h * y_h
        store_output(
            y, y_ptr + y_offset, pre_ptr + y_offset, y_l,
            z_ptr + b * z_b + wide * z_l + wide_h * z_h, z_l, p, left, HAS_Z, Q,
        )  # fmt: skip
