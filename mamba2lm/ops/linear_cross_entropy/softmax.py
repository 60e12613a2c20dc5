"""Triton kernel that turns logits into the loss of each token and their own gradient, in place.

    loss = log Σ_c exp(x_c) - x_label,    dx_c = exp(x_c) / Σ_c exp(x_c) - [c = label]

A program owns a token. It reads the row twice, the second time mostly from the cache: once for the
largest logit and the sum, once to write the gradient over it. Everything is computed in float32.

Letters: s tokens, v vocabulary, c a block of it. ``x_s`` is the stride of rows and ``padded`` their
width, divided by ``UNIT``, a power of two: multiplying by it again shows the compiler that rows are
aligned, and that a mask by the width is the same for whole vectors of logits.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e38)
"""Below every logit, and finite: its difference with -inf is no NaN."""


# Integers are not specialised on: a compilation takes seconds, and vocabularies come in all sizes.
@triton.jit(do_not_specialize=["x_s", "vocab_size", "padded", "ignore_index"])
def softmax_gradient_kernel(
    x_ptr, labels_ptr, loss_ptr, x_s, vocab_size, padded, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one token's loss, and write the gradient over its logits if wanted.

    Logits from ``vocab_size`` on are padding: no part of the sum, gradient zero. A label equal to
    ``ignore_index`` gives no loss and no gradient, any other that does not exist a loss of NaN.
    """
    s = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += s * x_s * UNIT
    padded *= UNIT
    label = tl.load(labels_ptr + s)
    counts = label != ignore_index
    # Before anything is written, so before the gradient takes its place.
    exists = (label >= 0) & (label < vocab_size)
    chosen = tl.load(x_ptr + label, mask=exists, other=float("nan")).to(tl.float32)
    c = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        x = tl.load(x_ptr + start + c, mask=c < padded - start, other=float("-inf"))
        x = tl.where(c < vocab_size - start, x.to(tl.float32) * LOG2_E, float("-inf"))
        # One of the two exponentials of an online softmax is always that of zero.
        rise = x - highest
        factor = tl.exp2(-tl.abs(rise))
        total = tl.where(rise > 0, total * factor + 1.0, total + factor)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp2(highest - top), axis=0)
    loss = (top + tl.log2(total)) * LN_2 - chosen
    tl.store(loss_ptr + s, tl.where(counts, loss, 0.0))
    if GRADIENT:
        scale = tl.where(counts, 1.0 / total, 0.0)
        for start in range(0, padded, BLOCK):
            inside = c < padded - start
            x = tl.load(x_ptr + start + c, mask=inside, other=float("-inf")).to(tl.float32)
            x = tl.where(c < vocab_size - start, x * LOG2_E, float("-inf"))
            dx = tl.exp2(x - top) * scale
            dx = tl.where((c + start == label) & counts, dx - 1.0, dx)
            tl.store(x_ptr + start + c, dx.to(x_ptr.dtype.element_ty), mask=inside)
