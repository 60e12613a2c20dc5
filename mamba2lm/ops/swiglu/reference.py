"""The gate of an MLP. Letters: f hidden width; leading axes are free."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x = [gate, up] (…, 2f), rounded after each of the two.

    Source: Shazeer 2020 (arXiv:2002.05202), equation 6, without biases.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
