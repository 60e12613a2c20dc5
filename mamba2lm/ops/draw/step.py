"""Triton kernel of the draw of the most likely token.

Letters: b batch row, v vocabulary.
"""

# Triton compiles the body below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from mamba2lm.ops.linear_step.step import wait_for_previous


@triton.jit(do_not_specialize=["v_size"])
def greedy_kernel(
    logits_ptr, drawn_ptr, token_ptr, logits_b, drawn_b, v_size,
    BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Find the most likely token of a row, −1 where that is not finite, and count it."""
    b = tl.cast(tl.program_id(0), tl.int64)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    wait_for_previous(CHAIN)
    for start in tl.range(0, v_size, BLOCK, num_stages=3):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + b * logits_b + v, mask=v < v_size, other=-float("inf"))
        higher = logit > best
        best = tl.where(higher, logit, best)
        place = tl.where(higher, v, place)
        wrong = tl.where(logit != logit, 1, wrong)
    most = tl.max(best, axis=0)
    # Of equal ones the first, as elsewhere.
    token = tl.min(tl.where(best == most, place, v_size), axis=0)
    finite = (tl.max(wrong, axis=0) == 0) & (tl.abs(most) < float("inf"))
    tl.store(token_ptr + b, tl.where(finite, token, -1).to(tl.int64))
    drawn_ptrs = drawn_ptr + b * drawn_b
    tl.store(drawn_ptrs, tl.load(drawn_ptrs) + 1)
