"""Document boundaries of packed rows.

Letters: b batch, l length.
"""

from __future__ import annotations

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
        int64 (b, l), non-decreasing along l and 0 at position 0.
    """
    return document_starts(seq_idx_bl).to(torch.int64).cumsum(dim=1)
