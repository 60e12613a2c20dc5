"""What both state-space operators do to their outputs: the skip D x and the gate silu(z)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return (y + D x) silu(z) in the dtype of y.

    Args:
        y: Outputs of a state-space map.
        x: Its inputs, same shape.
        D: Skip weights that broadcast against x, or None for no skip.
        z: Gate of the same shape, or None for no gate.
    """
    if D is not None:
        y = torch.addcmul(y, x, D.to(y.dtype))
    if z is not None:
        y = y * F.silu(z)
    return y
