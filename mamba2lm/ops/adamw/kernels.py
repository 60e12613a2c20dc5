"""Triton kernel of one step of AdamW over many tensors, in one pass over their memory.

    g = factor · gradient,   m = β₁ m + (1 - β₁) g,   v = β₂ v + (1 - β₂) g²
    w = (1 - rate · decay) w - step m / (√v · correction + ε)

with step = rate / (1 - β₁ᵗ) and correction = 1 / √(1 - β₂ᵗ). Where a copy of w in bfloat16 is kept,
it is written in the same pass. The tensors are found by a table of addresses, so that one launch
serves all; a program works through one chunk of one of them. Everything is computed in float32.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find(
    table_ptr, tensors, owner, start, KIND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Return a pointer to element ``start`` of a tensor in the table, (kind, tensor)."""
    found = tl.load(table_ptr + KIND * tensors + owner).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found + start


@triton.jit
def load(ptr, c, left, WHOLE: tl.constexpr):
    """Load a block; a whole one without a mask, which would keep loads from being wide."""
    if WHOLE:
        return tl.load(ptr + c)
    return tl.load(ptr + c, mask=c < left, other=0.0)


@triton.jit
def store(ptr, c, left, value, WHOLE: tl.constexpr):
    """Store a block."""
    if WHOLE:
        tl.store(ptr + c, value)
    else:
        tl.store(ptr + c, value, mask=c < left)


@triton.jit
def update(
    w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, copied, left,
    factor, kept, beta1, rest1, beta2, rest2, step, correction, eps,
    HAS_COPY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update a chunk, of which ``left`` elements exist."""
    for i in range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        w = load(w_ptr, c, left, WHOLE)
        g = load(g_ptr, c, left, WHOLE)
        m = load(m_ptr, c, left, WHOLE)
        v = load(v_ptr, c, left, WHOLE)
        g *= factor
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w = kept * w - step * m / (tl.sqrt(v) * correction + eps)
        store(w_ptr, c, left, w, WHOLE)
        store(m_ptr, c, left, m, WHOLE)
        store(v_ptr, c, left, v, WHOLE)
        if HAS_COPY:  # noqa: SIM102 (a constant, and a number of the device)
            if copied:
                store(copy_ptr, c, left, w.to(tl.bfloat16), WHOLE)


# Numbers are not specialised on: they change from step to step.
@triton.jit(
    do_not_specialize=[
        "tensors", "kept", "beta1", "rest1", "beta2", "rest2", "step", "correction", "eps",
    ]
)  # fmt: skip
def adamw_kernel(
    table_ptr, size_ptr, owner_ptr, place_ptr, factor_ptr,
    tensors, kept, beta1, rest1, beta2, rest2, step, correction, eps,
    HAS_FACTOR: tl.constexpr, HAS_COPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update BLOCKS blocks of the tensor that this program's chunk belongs to.

    The table has five rows: parameters, gradients, both moments (float32) and copies (bfloat16, or
    address 0). ``kept`` is what decay leaves of a weight, ``rest1`` is 1 - β₁.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owner_ptr + chunk)
    start = tl.cast(tl.load(place_ptr + chunk), tl.int64) * (BLOCK * BLOCKS)
    left = tl.load(size_ptr + owner) - start
    w_ptr = find(table_ptr, tensors, owner, start, 0, tl.float32, ALIGNED)
    g_ptr = find(table_ptr, tensors, owner, start, 1, tl.float32, ALIGNED)
    m_ptr = find(table_ptr, tensors, owner, start, 2, tl.float32, ALIGNED)
    v_ptr = find(table_ptr, tensors, owner, start, 3, tl.float32, ALIGNED)
    copy_ptr = find(table_ptr, tensors, owner, start, 4, tl.bfloat16, ALIGNED)
    copied = tl.load(table_ptr + 4 * tensors + owner) != 0
    factor = 1.0
    if HAS_FACTOR:
        factor = tl.load(factor_ptr)
    if left >= BLOCK * BLOCKS:
        update(
            w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, copied, left,
            factor, kept, beta1, rest1, beta2, rest2, step, correction, eps,
            HAS_COPY, True, BLOCK, BLOCKS,
        )  # fmt: skip
    else:
        update(
            w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, copied, left,
            factor, kept, beta1, rest1, beta2, rest2, step, correction, eps,
            HAS_COPY, False, BLOCK, BLOCKS,
        )  # fmt: skip
