"""Document boundaries of packed rows.

Letters: b batch, l length.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


@dataclass
class Fixed:
    """What holds while a pass is recorded as a CUDA graph, which has to serve other documents."""

    most: int
    """Documents that there may be, in all rows."""
    mattered: bool = False
    """Whether anything recorded depends on that number."""


_fixed: Fixed | None = None


@contextlib.contextmanager
def fixed(most: int) -> Iterator[Fixed]:
    """Answer what is asked within with tensors whose shapes do not depend on the documents.

    A recorded pass cannot wait for the device to learn how many there are. Answers are remembered
    within, as outside of recordings, but neither from before nor for after: they lie in the
    recording's memory.

    Args:
        most: Documents that rows will have at most, all together.

    Returns:
        What tells afterwards whether ``most`` was of any account.
    """
    global _fixed
    assert _fixed is None, "one recording at a time"
    _forget()
    _fixed = Fixed(most)
    try:
        yield _fixed
    finally:
        _fixed = None
        _forget()


def count_documents(seq_idx_bl: Tensor) -> int:
    """Return how many documents rows have, all together; for ids on the CPU, as batches come."""
    return int(document_starts(seq_idx_bl).sum()) + seq_idx_bl.shape[0]


def _remembers(ids: Tensor) -> bool:
    """Return whether a change of these ids would show, so that an answer may be kept."""
    if _fixed is not None:
        return True
    return not (
        torch.compiler.is_compiling()
        or not ids.is_cuda
        or torch.is_inference_mode_enabled()
        or ids.is_inference()
        or torch.cuda.is_current_stream_capturing()
    )


class _Remembered:
    """A function that keeps its last answer for the next question: every layer asks the same."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Begin with no answer.

        Args:
            compute: A function of ids that lie on a GPU, or it is asked anew.
        """
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if not _remembers(ids):
            return self._compute(ids)
        last = self._last
        if last is None or last[0]() is not ids or last[1] != ids._version:
            self._last = last = weakref.ref(ids), ids._version, self._compute(ids)
        return last[2]

    def forget(self) -> None:
        self._last = None


def _forget() -> None:
    document_ordinals.forget()
    document_bounds.forget()


@_Remembered
def document_ordinals(seq_idx_bl: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, … from left to right.

    Args:
        seq_idx_bl: Integer document ids, (b, l); see ``document_starts``.

    Returns:
        int32 (b, l), non-decreasing along l and 0 at position 0.
    """
    return document_starts(seq_idx_bl).cumsum(dim=1, dtype=torch.int32)


@_Remembered
def document_bounds(document_bl: Tensor) -> Tensor:
    """Return where documents begin in rows that are laid end to end, and the end of the last.

    The host waits for the device, to know how many documents there are; except within ``fixed``.

    Args:
        document_bl: Ordinals, (b, l); a row's first position begins a document.

    Returns:
        int32 (documents + 1); within ``fixed`` (most + 1), with the end repeated, as if empty
        documents followed.
    """
    first_bl = F.pad(document_bl[:, 1:] != document_bl[:, :-1], (1, 0), value=True)
    first_t, end = first_bl.flatten(), document_bl.numel()
    if _fixed is None:
        start_s = first_t.nonzero().squeeze(1)
        return F.pad(start_s, (0, 1), value=end).to(torch.int32)
    _fixed.mattered = True
    position_t = torch.arange(end, device=document_bl.device, dtype=torch.int32)
    # All other positions write the end behind the last document, one over the other.
    place_t = (first_t.cumsum(0) - 1).where(first_t, _fixed.most)
    bounds_s = position_t.new_full((_fixed.most + 1,), end)
    return bounds_s.scatter_(0, place_t, position_t.where(first_t, end))
