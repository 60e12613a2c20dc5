"""Triton kernels that add what a state from outside adds to the SSD's outputs.

    y_t += 2^cum_t C_t S,    cum_t the log₂ decay from the state to position t

A state fades: after some hundred or thousand positions 2^cum_t is nothing in float32, and all that
follows is left alone, in both passes. So the cost is that of the positions that the state reaches.

Letters: b batch, l length, h heads, p head dim, g groups, n state, q position in a chunk (t).
``document`` holds ordinals: those of the document at position 0 are 0.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

# Below 2^-126 a float32 is no normal number.
FADED = tl.constexpr(-126.0)


@triton.jit
def reaches(cum_row_ptr, document_row_ptr, start, HAS_DOCUMENTS: tl.constexpr):
    """Return whether the state is felt at the first position of a chunk, and so in it at all."""
    alive = tl.load(cum_row_ptr + start) > FADED
    if HAS_DOCUMENTS:
        alive = alive & (tl.load(document_row_ptr + start) == 0)
    return alive


@triton.jit
def decays(
    cum_row_ptr, document_row_ptr, start, length, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr
):
    """Return a chunk's factors 2^cum, 0 beyond the length and in later documents."""
    t = start + tl.arange(0, Q)
    cum = tl.load(cum_row_ptr + t, mask=t < length, other=float("-inf"))
    factor = tl.exp2(cum)
    if HAS_DOCUMENTS:
        document = tl.load(document_row_ptr + t, mask=t < length, other=1)
        factor = tl.where(document == 0, factor, 0.0)
    return factor


@triton.jit
def load_positions(base_ptr, stride, columns, start, length, Q: tl.constexpr):
    """Load a chunk's positions as rows, 0 beyond the length."""
    t = start + tl.arange(0, Q)
    wide = tl.cast(t, tl.int64)
    return tl.load(
        base_ptr + wide[:, None] * stride + columns[None, :], mask=(t < length)[:, None], other=0.0
    )


@triton.jit
def add_kernel(
    y_ptr, cum_ptr, document_ptr, C_ptr, state_ptr,
    y_b, y_l, y_h, C_b, C_l, C_g, length, heads, heads_per_group,
    HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the outputs of one chunk of one head."""
    start = tl.program_id(0) * Q
    row = tl.cast(tl.program_id(1), tl.int64)  # batch and head
    b = row // heads
    h = row % heads
    cum_ptr += row * length
    document_ptr += b * length
    if reaches(cum_ptr, document_ptr, start, HAS_DOCUMENTS):
        p = tl.arange(0, P)
        n = tl.arange(0, N)
        dtype = C_ptr.dtype.element_ty
        state = tl.load(state_ptr + row * P * N + p[:, None] * N + n[None, :]).to(dtype)
        C_base = C_ptr + b * C_b + (h // heads_per_group) * C_g
        C = load_positions(C_base, C_l, n, start, length, Q)
        factor = decays(cum_ptr, document_ptr, start, length, HAS_DOCUMENTS, Q)
        added = tl.dot(C, tl.trans(state), input_precision=PRECISION) * factor[:, None]
        y_base = y_ptr + b * y_b + h * y_h
        y = load_positions(y_base, y_l, p, start, length, Q).to(tl.float32) + added
        t = start + tl.arange(0, Q)
        places = y_base + tl.cast(t, tl.int64)[:, None] * y_l + p[None, :]
        tl.store(places, y.to(y_ptr.dtype.element_ty), mask=(t < length)[:, None])


@triton.jit
def state_gradient_kernel(
    dy_ptr, cum_ptr, document_ptr, C_ptr, partial_ptr,
    dy_b, dy_l, dy_h, C_b, C_l, C_g, length, heads, heads_per_group, rows,
    HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the state's gradient over every so many chunks of one head, until it has faded."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    row = tl.cast(tl.program_id(1), tl.int64)
    b = row // heads
    h = row % heads
    cum_ptr += row * length
    document_ptr += b * length
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    dy_base = dy_ptr + b * dy_b + h * dy_h
    C_base = C_ptr + b * C_b + (h // heads_per_group) * C_g
    total = tl.zeros((P, N), tl.float32)
    start = split * Q
    alive = start < length
    if alive:
        alive = reaches(cum_ptr, document_ptr, start, HAS_DOCUMENTS)
    while alive:
        C = load_positions(C_base, C_l, n, start, length, Q)
        dy = load_positions(dy_base, dy_l, p, start, length, Q).to(tl.float32)
        factor = decays(cum_ptr, document_ptr, start, length, HAS_DOCUMENTS, Q)
        weighted = (dy * factor[:, None]).to(C.dtype)
        total = tl.dot(tl.trans(weighted), C, total, input_precision=PRECISION)
        start += splits * Q
        alive = start < length
        if alive:
            alive = reaches(cum_ptr, document_ptr, start, HAS_DOCUMENTS)
    out = (split * tl.cast(rows, tl.int64) + row) * P * N + p[:, None] * N + n[None, :]
    tl.store(partial_ptr + out, total)


@triton.jit
def inputs_gradient_kernel(
    dy_ptr, cum_ptr, document_ptr, C_ptr, state_ptr, dcum_ptr, dC_ptr,
    dy_b, dy_l, dy_h, C_b, C_l, C_g, length, heads, groups, heads_per_group,
    HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of C and cum for one chunk, adding C's over the heads of a group."""
    start = tl.program_id(0) * Q
    pair = tl.cast(tl.program_id(1), tl.int64)  # batch and group
    b = pair // groups
    g = pair % groups
    document_ptr += b * length
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    t = start + tl.arange(0, Q)
    inside = t < length
    C = load_positions(C_ptr + b * C_b + g * C_g, C_l, n, start, length, Q)
    dC = tl.zeros((Q, N), tl.float32)
    for i in range(0, heads_per_group):
        h = g * heads_per_group + i
        row = b * heads + h
        if reaches(cum_ptr + row * length, document_ptr, start, HAS_DOCUMENTS):
            state = tl.load(state_ptr + row * P * N + p[:, None] * N + n[None, :]).to(C.dtype)
            dy = load_positions(dy_ptr + b * dy_b + h * dy_h, dy_l, p, start, length, Q)
            dy = dy.to(tl.float32)
            factor = decays(cum_ptr + row * length, document_ptr, start, length, HAS_DOCUMENTS, Q)
            weighted = dy * factor[:, None]
            through = tl.dot(C, tl.trans(state), input_precision=PRECISION)
            tl.store(dcum_ptr + row * length + t, tl.sum(weighted * through, axis=1), mask=inside)
            dC = tl.dot(weighted.to(C.dtype), state, dC, input_precision=PRECISION)
    wide = tl.cast(t, tl.int64)
    places = dC_ptr + ((b * length + wide)[:, None] * groups + g) * N + n[None, :]
    tl.store(places, dC.to(dC_ptr.dtype.element_ty), mask=inside[:, None])
