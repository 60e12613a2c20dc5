"""How a layer applies a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mamba2lm.layers.norm import compute_dtype
from mamba2lm.ops import products


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer: in training under autocast on a GPU by ``ops.products.linear``.

    Args:
        layer: Its weight and bias are used as attributes, so that they may be what LoRA makes them.
        x: (…, in_features).

    Returns:
        (…, out_features).
    """
    weight = layer.weight
    if (
        x.is_cuda
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and not isinstance(weight, DTensor)
    ):
        return products.linear(x.to(compute_dtype(x.device, x.dtype)), weight, layer.bias)
    return layer(x)
