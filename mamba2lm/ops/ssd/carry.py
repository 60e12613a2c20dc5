"""What a state that enters from outside adds to the outputs of the SSD.

The map is linear in its initial state, so outputs may be computed from a zero state first and
completed when the state is known: step 4 of ``ssd_chunked`` with the whole stretch as one chunk.

Letters: b batch, l length, h heads, p head dim, g groups, r heads per group, n state.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.dispatch import Impl, choose_impl
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.kernels import Launches, on_device, signature, unit_stride
from mamba2lm.ops.ssd.launch import unsupported

CHUNK = 64
"""Positions that a program of the kernels treats at once."""
SPLITS = 16
"""Programs among which the chunks of one head are dealt out for the state's gradient."""
BLOCK = 1024
"""Positions that ``running_sum`` adds up in one row."""


def add_carried_outputs(
    y: Tensor,
    log_decay: Tensor,
    C: Tensor,
    entering_states: Tensor,
    *,
    seq_idx: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return y_t + C_t exp(log_decay_t) h for the state h before position 0.

    Args:
        y: Outputs from a zero state, (b, l, h, p), in the dtype of C; may be overwritten, so they
            must be fresh and no backward pass may need them (``ssd`` without a gate is so).
        log_decay: Log of the decay from the state to each position, the cumulative sum of Δ A,
            (b, h, l), float32 (float64 for float64 inputs); it never rises.
        C: Output maps, (b, l, g, n) with h divisible by g; the product runs in their dtype.
        entering_states: (b, h, p, n). It belongs to the document at position 0.
        seq_idx: Document ids, (b, l).
        impl: As for ``ssd``. The kernels leave out what the state does not reach any more.

    Returns:
        (b, l, h, p), what ``ssd`` gives with these initial states.

    Source: Dao & Gu 2024 (arXiv:2405.21060), listing 1, step 4.
    """
    reason = unsupported(y, C)
    if torch.compiler.is_compiling():
        reason = "torch.compile does not see into the kernels"
    document = None if seq_idx is None else document_ordinals(seq_idx)
    with torch.autocast(C.device.type, enabled=False):
        if choose_impl("ssd", impl, y, unsupported=reason) == "triton":
            return _Added.apply(y, log_decay, C, entering_states, document)
        return y + _carried_outputs(log_decay, C, entering_states, document)


def _carried_outputs(
    log_decay: Tensor, C: Tensor, entering_states: Tensor, document_bl: Tensor | None
) -> Tensor:
    b, h, length = log_decay.shape
    g, n = C.shape[2:]
    p = entering_states.shape[2]
    factor_bhl = log_decay.exp()
    if document_bl is not None:
        factor_bhl = factor_bhl.where((document_bl == 0).unsqueeze(1), 0.0)
    entering_bgnm = entering_states.to(C.dtype).reshape(b, g, -1, n).transpose(2, 3)
    y_bglm = C.transpose(1, 2) @ entering_bgnm
    y_blhp = y_bglm.transpose(1, 2).reshape(b, length, h, p)
    return (y_blhp * factor_bhl.transpose(1, 2).unsqueeze(-1)).to(C.dtype)


def running_sum(x: Tensor) -> Tensor:
    """Add up along the last axis, in blocks: few long rows would leave a GPU idle."""
    length = x.shape[-1]
    if length <= BLOCK:
        return x.cumsum(dim=-1)
    blocks = F.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK)).cumsum(dim=-1)
    before = F.pad(blocks[..., :-1, -1].cumsum(dim=-1), (1, 0))
    return (blocks + before.unsqueeze(-1)).flatten(-2)[..., :length]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        log_decay: Tensor,
        C: Tensor,
        entering_states: Tensor,
        document: Tensor | None,
    ) -> Tensor:
        forward(y, log_decay, C, entering_states, document)
        ctx.save_for_backward(log_decay, C, entering_states, document)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        return dy, *backward(dy, *ctx.saved_tensors), None


def forward(
    y: Tensor, log_decay: Tensor, C: Tensor, entering_states: Tensor, document: Tensor | None
) -> None:
    """Run the forward kernel, which adds to ``y`` in place.

    Args: as ``add_carried_outputs``, ``document`` being ordinals (b, l).
    """
    launch, sizes, (cum, C, states, documents) = _prepared(
        "add", y, log_decay, C, entering_states, document
    )
    b, length, h, _ = y.shape
    with on_device(y.device):
        launch(
            _kernels().add_kernel, (-(-length // CHUNK), b * h, 1),
            y, cum, documents, C, states,
            *y.stride()[:3], *C.stride()[:3], length, h, h // C.shape[2],
            warps=4, HAS_DOCUMENTS=document is not None, **sizes,
        )  # fmt: skip


def backward(
    dy: Tensor, log_decay: Tensor, C: Tensor, entering_states: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels; return the gradients of the log decay, C and the state."""
    dy = unit_stride(dy)
    launch, sizes, (cum, C, states, documents) = _prepared(
        "add backward", dy, log_decay, C, entering_states, document
    )
    b, length, h, _ = dy.shape
    g = C.shape[2]
    chunks = -(-length // CHUNK)
    splits = min(SPLITS, chunks)
    dcum = torch.zeros_like(cum)
    dC = torch.empty(C.shape, dtype=C.dtype, device=C.device)
    partial = torch.empty(splits, *states.shape, dtype=torch.float32, device=C.device)
    strides = (*dy.stride()[:3], *C.stride()[:3], length, h)
    with on_device(dy.device):
        launch(
            _kernels().state_gradient_kernel, (splits, b * h, 1),
            dy, cum, documents, C, partial, *strides, h // g, b * h,
            warps=4, HAS_DOCUMENTS=document is not None, **sizes,
        )  # fmt: skip
        launch(
            _kernels().inputs_gradient_kernel, (chunks, b * g, 1),
            dy, cum, documents, C, states, dcum, dC, *strides, g, h // g,
            warps=4, HAS_DOCUMENTS=document is not None, **sizes,
        )  # fmt: skip
    return dcum, dC, partial.sum(dim=0).to(states.dtype)


@lru_cache
def _kernels() -> Any:
    return importlib.import_module("mamba2lm.ops.ssd.carry_kernels")


def _prepared(
    name: str,
    y: Tensor,
    log_decay: Tensor,
    C: Tensor,
    states: Tensor,
    document: Tensor | None,
) -> tuple[Launches, dict[str, Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return how to launch, and inputs as the kernels take them: decays are powers of two there."""
    cum = (log_decay / math.log(2)).contiguous()
    C, states = unit_stride(C), states.contiguous()
    documents = cum if document is None else document.to(torch.int32).contiguous()
    key = (signature(tensor) for tensor in (y, cum, C, states, document))
    sizes = {"Q": CHUNK, "P": states.shape[2], "N": states.shape[3], "PRECISION": "ieee"}
    return Launches(y.device, "ssd carry", name, *key), sizes, (cum, C, states, documents)
