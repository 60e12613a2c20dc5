"""Cross-entropy of a linear head whose rows are divided over processes.

As ``chunked``, with three numbers a token exchanged: the largest logit, then, in one sum, the
partition function and the label's logit. No process ever has all the logits of a token.

Letters: t tokens, s tokens of a chunk, d model width, v this process's rows of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.dispatch import state_dtype
from mamba2lm.ops.linear_cross_entropy.chunked import CHUNK_ELEMENTS, scaled


def linear_cross_entropy_parallel(
    hidden_td: Tensor,
    weight_vd: Tensor,
    labels_t: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    group: dist.ProcessGroup,
) -> Tensor:
    """Compute what ``linear_cross_entropy_reference`` computes with everybody's rows.

    Args:
        hidden_td: Last hidden states, the same on every process, (t, d).
        weight_vd: This process's rows of the head: those of rank r begin at r · v.
        labels_t: Target ids, (t,).
        vocab_size: Rows that are real, counted over all processes.
        ignore_index: Label whose positions count for nothing.
        reduction: ``"mean"``, ``"sum"``; or ``"none"``, without gradient.
        group: The processes that have the other rows.

    Returns:
        As the reference, the same on every process. Differentiable once; the gradient of
        ``hidden_td`` is this process's part of a sum over the group.
    """
    learns = torch.is_grad_enabled() and (hidden_td.requires_grad or weight_vd.requires_grad)
    if learns and reduction == "none":
        raise ValueError("reduction='none' has no gradient over a group; use 'sum' or 'mean'.")
    loss_t, loss = _ParallelLinearCrossEntropy.apply(
        hidden_td, weight_vd, labels_t, vocab_size, ignore_index, group, learns
    )
    if reduction == "none":
        return loss_t
    if reduction == "sum":
        return loss
    return loss / (labels_t != ignore_index).sum().clamp(min=1)


class _ParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_td: Tensor,
        weight_vd: Tensor,
        labels_t: Tensor,
        vocab_size: int,
        ignore_index: int,
        group: dist.ProcessGroup,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(hidden_td)
        v = weight_vd.shape[0]
        first = group.rank() * v
        real = min(max(vocab_size - first, 0), v)
        # Rows of whole 16 bytes: matrix units are several times slower without.
        head_vd = F.pad(weight_vd.to(hidden_td.dtype), (0, 0, 0, -v % 8))
        dhidden_td = torch.empty_like(hidden_td) if learns else None
        dweight_vd = torch.zeros_like(head_vd, dtype=dtype) if learns else None
        losses = []
        most = CHUNK_ELEMENTS.get(hidden_td.device.type, CHUNK_ELEMENTS["cpu"])
        step = max(1, most // v)
        for start in range(0, hidden_td.shape[0], step):
            hidden_sd = hidden_td[start : start + step]
            label_s1 = labels_t[start : start + step].unsqueeze(1)
            counts_s1 = label_s1 != ignore_index
            row_s1 = label_s1 - first
            mine_s1 = counts_s1 & (row_s1 >= 0) & (row_s1 < real)
            row_s1 = row_s1.where(mine_s1, 0)
            logits_sv = (hidden_sd @ head_vd.t()).to(dtype)
            logits_sv[:, real:] = -torch.inf
            highest_s1 = logits_sv.amax(dim=1, keepdim=True)
            dist.all_reduce(highest_s1, dist.ReduceOp.MAX, group=group)
            label_logit_s1 = logits_sv.gather(1, row_s1).where(mine_s1, 0.0)
            exponential_sv = logits_sv.sub_(highest_s1).exp_()
            sums_s2 = torch.cat([exponential_sv.sum(dim=1, keepdim=True), label_logit_s1], dim=1)
            dist.all_reduce(sums_s2, group=group)
            partition_s1 = sums_s2[:, :1]
            loss_s1 = highest_s1 + partition_s1.log() - sums_s2[:, 1:]
            losses.append(loss_s1.where(counts_s1, 0.0).squeeze(1))
            if dhidden_td is None or dweight_vd is None:
                continue
            dlogits_sv = exponential_sv.div_(partition_s1)
            dlogits_sv.scatter_add_(1, row_s1, -mine_s1.to(dtype))
            dlogits_sv = dlogits_sv.mul_(counts_s1).to(hidden_td.dtype)
            torch.mm(dlogits_sv, head_vd, out=dhidden_td[start : start + step])
            dweight_vd += dlogits_sv.t() @ hidden_sd
        ctx.weight_dtype = weight_vd.dtype
        if dweight_vd is not None:
            ctx.save_for_backward(dhidden_td, dweight_vd[:v])
        loss_t = torch.cat(losses)
        ctx.mark_non_differentiable(loss_t)
        return loss_t, loss_t.sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _: Tensor, dloss: Tensor
    ) -> tuple[Tensor | None, ...]:
        dhidden_td, dweight_vd = ctx.saved_tensors
        return (
            scaled(dhidden_td, dloss),
            (dweight_vd * dloss).to(ctx.weight_dtype),
            *[None] * 5,
        )
