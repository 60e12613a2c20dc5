"""Cross-entropy of a linear head. Letters: t tokens, d model width, v vocabulary (padded)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops.dispatch import state_dtype


def linear_cross_entropy_reference(
    hidden_td: Tensor,
    weight_vd: Tensor,
    labels_t: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Return −log softmax(hidden weightᵀ)[label] over the first ``vocab_size`` rows.

    Args:
        hidden_td: Last hidden states, (t, d); the product runs in their dtype.
        weight_vd: Head, (v, d) with v ≥ vocab_size.
        labels_t: Target ids, (t,), int64.
        vocab_size: Rows that are real; the rest never enter the softmax.
        ignore_index: Label whose positions count for nothing.
        reduction: ``"mean"`` over the labels that count, ``"sum"`` or ``"none"``.

    Returns:
        Scalar, or (t,) for ``"none"``, float32 (float64 for float64 inputs).
    """
    logits_tv = hidden_td @ weight_vd[:vocab_size].to(hidden_td.dtype).t()
    loss_t = F.cross_entropy(
        logits_tv.to(state_dtype(hidden_td)), labels_t, ignore_index=ignore_index, reduction="none"
    )
    if reduction == "none":
        return loss_t
    if reduction == "sum":
        return loss_t.sum()
    # Dividing by at least one keeps a batch without labels at 0, with a graph, instead of NaN.
    return loss_t.sum() / (labels_t != ignore_index).sum().clamp(min=1)
