"""Document boundaries of packed rows.

Letters: b batch, l length.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(seq_idx_bl: Tensor) -> Tensor:
    """Mark the first position of every document but the row's first.

    Args:
        seq_idx_bl: Integer document ids, (b, l). Only changes count: an id that comes back later
            in the row begins a new document.

    Returns:
        Boolean (b, l); position 0 is False, as it continues whatever state was passed in.
    """
    changed = seq_idx_bl[:, 1:] != seq_idx_bl[:, :-1]
    return F.pad(changed, (1, 0))


def document_ordinals(seq_idx_bl: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, … from left to right.

    Args:
        seq_idx_bl: Integer document ids, (b, l); see ``document_starts``.

    Returns:
        int32 (b, l), non-decreasing along l and 0 at position 0. On a GPU the last answer is kept
        for the next question: every layer of a model asks the same.
    """
    if not _remembers(seq_idx_bl):
        return _ordinals(seq_idx_bl)
    global _last
    last = _last
    if last is None or last[0]() is not seq_idx_bl or last[1] != seq_idx_bl._version:
        _last = last = weakref.ref(seq_idx_bl), seq_idx_bl._version, _ordinals(seq_idx_bl)
    return last[2]


_last: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def _ordinals(seq_idx_bl: Tensor) -> Tensor:
    return document_starts(seq_idx_bl).cumsum(dim=1, dtype=torch.int32)


def _remembers(seq_idx_bl: Tensor) -> bool:
    """Return whether a change of these ids would show, so that an answer may be kept."""
    return not (
        torch.compiler.is_compiling()
        or not seq_idx_bl.is_cuda
        or seq_idx_bl.is_inference()
        or torch.cuda.is_current_stream_capturing()
    )
