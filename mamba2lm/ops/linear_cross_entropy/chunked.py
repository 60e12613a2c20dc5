"""Cross-entropy of a linear head that never holds all the logits.

The loss is a sum over tokens, so its gradient is known as soon as a token's logits are: softmax
minus one at the label. Each chunk of tokens is projected, turned into its gradient in place and
multiplied back at once; the backward pass only scales what the forward pass has found. (The same
idea as Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989, §3.2.)

On a GPU one Triton kernel makes losses and gradient out of a chunk's logits, in the dtype that they
have; PyTorch's operations go through float32 copies.

Letters: t tokens, s tokens of a chunk, d model width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.copies import in_dtype
from mamba2lm.ops.linear_cross_entropy.launch import softmax_gradient, softmax_gradient_op
from mamba2lm.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from mamba2lm.ops.products import add_matrix_gradient

# Elements of one chunk's logits: 8 MiB of float32 on a CPU, to stay near its caches; more on a GPU,
# where fewer and larger products pay.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}

WHOLE_TOKENS = 128
"""Chunks of more tokens than this are a multiple of it, to fill the tiles of matrix units."""


def linear_cross_entropy_chunked(
    hidden_td: Tensor,
    weight_vd: Tensor,
    labels_t: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    kernel: bool,
) -> Tensor:
    """Compute what ``linear_cross_entropy_reference`` computes, for "mean" and "sum".

    Args, Returns: as ``linear_cross_entropy_reference``; ``kernel`` says whether the Triton kernel
    may run. Differentiable once.
    """
    learns = torch.is_grad_enabled() and (hidden_td.requires_grad or weight_vd.requires_grad)
    loss = _ChunkedLinearCrossEntropy.apply(
        hidden_td, weight_vd, labels_t, vocab_size, ignore_index, learns, kernel
    )
    if reduction == "sum":
        return loss
    return loss / (labels_t != ignore_index).sum().clamp(min=1)


def linear_cross_entropy_each(
    hidden_td: Tensor,
    weight_vd: Tensor,
    labels_t: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
) -> Tensor:
    """Return every token's loss, with the logits of one chunk of tokens at a time.

    Args, Returns: as ``linear_cross_entropy_reference`` for "none". Not differentiable.
    """
    step = tokens_of_chunk(hidden_td.device, vocab_size)
    weight_vd = weight_vd[:vocab_size].to(hidden_td.dtype)
    parts = [
        linear_cross_entropy_reference(
            hidden_sd, weight_vd, labels_s,
            vocab_size=vocab_size, ignore_index=ignore_index, reduction="none",
        )
        for hidden_sd, labels_s in zip(hidden_td.split(step), labels_t.split(step), strict=True)
    ]  # fmt: skip
    return torch.cat(parts)


def tokens_of_chunk(device: torch.device, v: int) -> int:
    """Return how many tokens' logits are held at a time."""
    tokens = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // v)
    return tokens // WHOLE_TOKENS * WHOLE_TOKENS if tokens > WHOLE_TOKENS else tokens


def softmax_gradient_torch(
    logits_sv: Tensor, labels_s: Tensor, vocab_size: int, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Compute what the kernel does, with PyTorch's operations.

    Returns:
        Losses (s,), float32, and the gradient of the logits (s, v) in their dtype; without
        ``gradient`` an arbitrary tensor.
    """
    counts_s1 = (labels_s != ignore_index).unsqueeze(1)
    label_s1 = labels_s.unsqueeze(1).where(counts_s1, 0)
    wide_sv = logits_sv.to(torch.float32)
    wide_sv[:, vocab_size:] = float("-inf")
    partition_s1 = wide_sv.logsumexp(dim=1, keepdim=True)
    loss_s1 = (partition_s1 - wide_sv.gather(1, label_s1)).where(counts_s1, 0.0)
    if gradient:
        wide_sv.sub_(partition_s1).exp_()
        wide_sv.scatter_add_(1, label_s1, torch.full_like(partition_s1, -1.0))
        wide_sv.mul_(counts_s1)
    return loss_s1.squeeze(1), wide_sv.to(logits_sv.dtype)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a gradient times a float32 number, rounded once: the number itself is not."""
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_td: Tensor,
        weight_vd: Tensor,
        labels_t: Tensor,
        vocab_size: int,
        ignore_index: int,
        learns: bool,
        kernel: bool,
    ) -> Tensor:
        # All rows, although the padding is masked: matrix units want rows of whole 16 bytes.
        head_vd = in_dtype(weight_vd, hidden_td.dtype)
        dhidden_td = torch.empty_like(hidden_td) if learns else None
        dweight_vd = torch.zeros_like(weight_vd, dtype=torch.float32) if learns else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_td.device)
        step = tokens_of_chunk(hidden_td.device, head_vd.shape[0])
        fused = softmax_gradient_op if torch.compiler.is_compiling() else softmax_gradient
        for start in range(0, hidden_td.shape[0], step):
            hidden_sd, labels_s = hidden_td[start : start + step], labels_t[start : start + step]
            logits_sv = hidden_sd @ head_vd.t()
            if kernel:
                loss_s = fused(logits_sv, labels_s, vocab_size, ignore_index, learns)
            else:
                loss_s, logits_sv = softmax_gradient_torch(
                    logits_sv, labels_s, vocab_size, ignore_index, learns
                )
            loss = loss + loss_s.sum()  # in place it has no gradient, compiled by torch 2.11
            if dhidden_td is None or dweight_vd is None:
                continue
            torch.mm(logits_sv, head_vd, out=dhidden_td[start : start + step])
            add_matrix_gradient(dweight_vd, logits_sv, hidden_sd)
        ctx.weight_dtype = weight_vd.dtype
        if learns:
            ctx.save_for_backward(dhidden_td, dweight_vd)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dloss: Tensor
    ) -> tuple[Tensor | None, ...]:
        dhidden_td, dweight_vd = ctx.saved_tensors
        return (
            scaled(dhidden_td, dloss),
            (dweight_vd * dloss).to(ctx.weight_dtype),
            *[None] * 5,
        )
