"""Triton kernels of the draw of the most likely token.

The vocabulary of one row is more than one program reads quickly, so ``best_kernel`` finds the best
of each part of it and ``choose_kernel`` the best of these.

Letters: b batch row, v vocabulary, s part of it.
"""

# Triton compiles the body below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.linear_step.step import wait_for_previous


@triton.jit(do_not_specialize=["v_size", "width"])
def best_kernel(
    logits_ptr, best_ptr, place_ptr, logits_b, v_size, width,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Find the largest logit of ``width`` of a row, +∞ where there is a NaN, and its place."""
    b = tl.cast(tl.program_id(1), tl.int64)
    s = tl.program_id(0)
    first = s * width
    last = tl.minimum(first + width, v_size)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    wait_for_previous(CHAIN)
    for start in tl.range(first, last, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + b * logits_b + v, mask=v < last, other=-float("inf"))
        logit = tl.where(logit != logit, float("inf"), logit)
        higher = logit > best
        best = tl.where(higher, logit, best)
        place = tl.where(higher, v, place)
    most = tl.max(best, axis=0)
    tl.store(best_ptr + b * PARTS + s, most)
    # Of equal ones the first, as elsewhere.
    tl.store(place_ptr + b * PARTS + s, tl.min(tl.where(best == most, place, v_size), axis=0))


@triton.jit
def choose_kernel(
    best_ptr, place_ptr, drawn_ptr, token_ptr, drawn_b,
    PARTS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Choose a row's token, −1 where its logits are not finite, and count it."""
    b = tl.cast(tl.program_id(0), tl.int64)
    s = tl.arange(0, PARTS)
    wait_for_previous(CHAIN)
    best = tl.load(best_ptr + b * PARTS + s)
    place = tl.load(place_ptr + b * PARTS + s)
    most = tl.max(best, axis=0)
    token = tl.min(tl.where(best == most, place, 0x7FFFFFFF), axis=0)
    tl.store(token_ptr + b, tl.where(tl.abs(most) < float("inf"), token, -1).to(tl.int64))
    drawn_ptrs = drawn_ptr + b * drawn_b
    tl.store(drawn_ptrs, tl.load(drawn_ptrs) + 1)
