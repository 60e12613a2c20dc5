"""The public head-plus-cross-entropy operator. Letters: d model width, v vocabulary (padded)."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mamba2lm.ops.dispatch import Impl, choose_impl
from mamba2lm.ops.kernels import no_kernels
from mamba2lm.ops.linear_cross_entropy.chunked import (
    linear_cross_entropy_chunked,
    linear_cross_entropy_each,
)
from mamba2lm.ops.linear_cross_entropy.parallel import linear_cross_entropy_parallel
from mamba2lm.ops.linear_cross_entropy.reference import linear_cross_entropy_reference


def unsupported(hidden: Tensor, reduction: str, group: ProcessGroup | None) -> str | None:
    """Say why the kernel cannot take these inputs, or None when it can."""
    if (reason := no_kernels(hidden)) is not None:
        return reason
    if reduction == "none":
        return "reduction='none' keeps all the logits"
    if group is not None:
        return "the vocabulary is divided over processes"
    return None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Project hidden states to logits and return their cross-entropy with the labels.

    The product runs in autocast's dtype where that is on, else in the dtype of ``hidden``
    (``weight`` is cast); the softmax in float32 (float64 for float64 inputs). ``auto`` works
    through the tokens in chunks and never holds all the logits, save for a "none" that is to be
    differentiated; ``reference`` does, and can be differentiated twice.

    Args:
        hidden: Last hidden states, (…, d).
        weight: Head, (v, d).
        labels: Target ids, (…), integers below ``vocab_size`` or ``ignore_index``.
        vocab_size: Real vocabulary; rows of ``weight`` from there on are padding and never
            enter the softmax. None means all v.
        ignore_index: Label whose positions count for nothing.
        reduction: ``"mean"`` over labels that count (0 if there are none), ``"sum"``, ``"none"``.
        impl: ``"auto"`` (the kernel of a chunk's softmax on a GPU where it applies), ``"triton"``
            or ``"reference"``.
        group: Processes that have an equal number of rows of ``weight`` each, in order of rank;
            ``vocab_size`` and labels count over all. The gradient of ``hidden`` is then this
            process's part of a sum over the group.

    Returns:
        The loss in nats: a scalar, or (…) for ``"none"``, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, an impossible ``vocab_size``, an unknown reduction,
            or an implementation that does not exist.
    """
    reason = unsupported(hidden, reduction, group)
    chosen = choose_impl("linear_cross_entropy", impl, hidden, unsupported=reason)
    chunked = impl != "reference" and reduction != "none" and hidden.dtype != torch.float64
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (v, d={hidden.shape[-1]})."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {tuple(hidden.shape[:-1])}."
        )
    v = weight.shape[0]
    v = v if group is None else v * group.size()
    vocab_size = v if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= v:
        raise ValueError(f"vocab_size={vocab_size} must lie between 1 and the {v} rows of weight.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; use 'mean', 'sum' or 'none'.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    compute = linear_cross_entropy_reference
    if chunked:
        compute = functools.partial(linear_cross_entropy_chunked, kernel=chosen == "triton")
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if group is not None:
        compute = functools.partial(linear_cross_entropy_parallel, group=group)
    elif impl == "auto" and reduction == "none" and not learns:
        with torch.autocast(device, enabled=False):
            loss = linear_cross_entropy_each(
                hidden.flatten(0, -2),
                weight,
                labels.flatten().long(),
                vocab_size=vocab_size,
                ignore_index=ignore_index,
            )
        return loss.view(labels.shape)
    with torch.autocast(device, enabled=False):
        loss = compute(
            hidden.flatten(0, -2),
            weight,
            labels.flatten().long(),
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    return loss.view(labels.shape) if reduction == "none" else loss
