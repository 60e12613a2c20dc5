"""Document boundaries of packed rows.

Letters: b batch, l length.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps

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


def _remembers(ids: Tensor) -> bool:
    """Return whether a change of these ids would show, so that an answer may be kept."""
    return not (
        torch.compiler.is_compiling()
        or not ids.is_cuda
        or torch.is_inference_mode_enabled()
        or ids.is_inference()
        or torch.cuda.is_current_stream_capturing()
    )


def remembered(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep a function's last answer for the next question: every layer of a model asks the same.

    Args:
        compute: A function of ids that lie on a GPU, or it is asked anew.
    """
    last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    @wraps(compute)
    def ask(ids: Tensor) -> Tensor:
        nonlocal last
        if not _remembers(ids):
            return compute(ids)
        if last is None or last[0]() is not ids or last[1] != ids._version:
            last = weakref.ref(ids), ids._version, compute(ids)
        return last[2]

    return ask


@remembered
def document_ordinals(seq_idx_bl: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, … from left to right.

    Args:
        seq_idx_bl: Integer document ids, (b, l); see ``document_starts``.

    Returns:
        int32 (b, l), non-decreasing along l and 0 at position 0.
    """
    return document_starts(seq_idx_bl).cumsum(dim=1, dtype=torch.int32)


@remembered
def document_bounds(document_bl: Tensor) -> Tensor:
    """Return where documents begin in rows that are laid end to end, and the end of the last.

    The host waits for the device, to know how many documents there are.

    Args:
        document_bl: Ordinals, (b, l); a row's first position begins a document.

    Returns:
        int32 (documents + 1).
    """
    first_bl = F.pad(document_bl[:, 1:] != document_bl[:, :-1], (1, 0), value=True)
    start_s = first_bl.flatten().nonzero().squeeze(1)
    return F.pad(start_s, (0, 1), value=document_bl.numel()).to(torch.int32)
