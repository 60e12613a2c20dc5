"""Triton kernels of the draw of a token.

The most likely one: the vocabulary of a row is more than one program reads quickly, so
``best_kernel`` finds the best of each part of it and ``choose_kernel`` the best of these.

At random: a program draws for a row (``sample_kernel``). Top-k and top-p need no order, only the
limit that a kept token's weight must reach, which a search over all float32 numbers finds exactly.

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


@triton.jit
def weights_of(scores_ptr, v, v_size, most, scale):
    """Load scores and return what their tokens are drawn with, the best one's 1."""
    score = tl.load(scores_ptr + v, mask=v < v_size, other=-float("inf"))
    return tl.exp2((score - most) * scale)


@triton.jit
def mass_above(
    scores_ptr, v_size, most, scale, least, first, second, third,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the weight (or number) of tokens that weigh ``least`` and each of three limits.

    Weights are compared by their bits, which are in the same order.
    """
    total_1 = tl.zeros((BLOCK,), tl.float32)
    total_2 = tl.zeros((BLOCK,), tl.float32)
    total_3 = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, v_size, BLOCK):
        v = start + tl.arange(0, BLOCK)
        weight = weights_of(scores_ptr, v, v_size, most, scale)
        bits = weight.to(tl.int32, bitcast=True)
        share = tl.where(v < v_size, 1.0, 0.0) if COUNT else weight
        share = tl.where(bits >= least, share, 0.0)
        total_1 += tl.where(bits >= first, share, 0.0)
        total_2 += tl.where(bits >= second, share, 0.0)
        total_3 += tl.where(bits >= third, share, 0.0)
    return tl.sum(total_1, axis=0), tl.sum(total_2, axis=0), tl.sum(total_3, axis=0)


@triton.jit
def largest_limit(
    scores_ptr, v_size, most, scale, least, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the bits of the largest weight above which lies at least ``wanted``.

    ``least`` is a limit that has it. A search by quarters: all 2³⁰ limits take 15 passes.
    """
    low = least
    high = 0x3F800001  # the next above 1
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        first = low + quarter
        second = tl.minimum(first + quarter, high)
        third = tl.minimum(second + quarter, high)
        mass_1, mass_2, mass_3 = mass_above(
            scores_ptr, v_size, most, scale, least, first, second, third, COUNT, BLOCK
        )
        if mass_3 >= wanted:
            low = third
        elif mass_2 >= wanted:
            low, high = second, third
        elif mass_1 >= wanted:
            low, high = first, second
        else:
            high = first
    return low


@triton.jit
def mix(z):
    """Hash 64 bits (splitmix64)."""
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def uniform(seed, drawn):
    """Return the number in [0, 1) of a seed and a number of tokens drawn, float64."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    hashed = mix(mix(seed.to(tl.uint64) + golden) + drawn.to(tl.uint64) * golden)
    return (hashed >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["v_size"])
def sample_kernel(
    scores_ptr, seed_ptr, drawn_ptr, top_k_ptr, temperature_ptr, top_p_ptr, min_p_ptr, token_ptr,
    scores_b, integers_b, numbers_b, v_size,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Draw a token of a row by its settings, −1 where its scores are not finite, and count it.

    One number in [0, 1) picks the token at that share of the weight of all that are kept, in the
    order of the vocabulary.
    """
    b = tl.cast(tl.program_id(0), tl.int64)
    scores_ptr += b * scores_b
    wait_for_previous(CHAIN)
    temperature = tl.load(temperature_ptr + b * numbers_b)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, v_size, BLOCK):
        v = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + v, mask=v < v_size, other=-float("inf"))
        score = tl.where(score != score, float("inf"), score)
        higher = score > best
        best = tl.where(higher, score, best)
        place = tl.where(higher, v, place)
    most = tl.max(best, axis=0)
    token = tl.min(tl.where(best == most, place, v_size), axis=0)
    finite = tl.abs(most) < float("inf")
    drawn = tl.load(drawn_ptr + b * integers_b)
    if (temperature > 0.0) & finite:
        scale = 1.4426950408889634 / temperature
        least = 0
        if LIMITED:
            top_k = tl.load(top_k_ptr + b * integers_b)
            top_p = tl.load(top_p_ptr + b * numbers_b)
            if (top_k > 0) & (top_k < v_size):
                least = largest_limit(
                    scores_ptr, v_size, most, scale, least, top_k.to(tl.float32), True, BLOCK
                )
            if top_p < 1.0:
                total, _, _ = mass_above(
                    scores_ptr, v_size, most, scale, least, least, least, least, False, BLOCK
                )
                least = largest_limit(
                    scores_ptr, v_size, most, scale, least, total * top_p, False, BLOCK
                )
        min_p = tl.load(min_p_ptr + b * numbers_b)
        least = tl.maximum(least, min_p.to(tl.int32, bitcast=True))
        whole = tl.zeros((), tl.float64)
        for start in tl.range(0, v_size, BLOCK):
            weight = weights_of(scores_ptr, start + tl.arange(0, BLOCK), v_size, most, scale)
            kept = tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0)
            whole += tl.sum(kept, axis=0).to(tl.float64)
        target = uniform(tl.load(seed_ptr + b * integers_b), drawn) * whole
        before = tl.zeros((), tl.float64)
        found = v_size
        last = token
        for start in tl.range(0, v_size, BLOCK):
            v = start + tl.arange(0, BLOCK)
            weight = weights_of(scores_ptr, v, v_size, most, scale)
            kept = tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0)
            after = before + tl.sum(kept, axis=0).to(tl.float64)
            if (found == v_size) & (after > target):
                reached = before + tl.cumsum(kept, axis=0).to(tl.float64)
                found = tl.min(tl.where((reached > target) & (kept > 0.0), v, v_size), axis=0)
            last = tl.maximum(last, tl.max(tl.where(kept > 0.0, v, -1), axis=0))
            before = after
        # Where sums round: the last token of any weight.
        token = tl.where(found < v_size, found, last)
    tl.store(token_ptr + b, tl.where(finite, token, -1).to(tl.int64))
    tl.store(drawn_ptr + b * integers_b, drawn + 1)
