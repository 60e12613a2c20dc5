"""Rotary position embedding. Letters: b batch, l length, h heads, p head dim, r rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x_blhp: Tensor, cos_blr: Tensor, sin_blr: Tensor) -> Tensor:
    """Rotate the first 2r channels of each head, pairing channel i with i + r.

    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2.2, pairs in GPT-NeoX's order.
    """
    pairs = cos_blr.shape[-1]
    x = x_blhp.to(torch.promote_types(x_blhp.dtype, torch.float32))
    cos, sin = (angle.unsqueeze(2).to(x.dtype) for angle in (cos_blr, sin_blr))
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x_blhp[..., 2 * pairs :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x_blhp.dtype), rest], dim=-1)
