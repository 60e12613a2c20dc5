"""Copies of float32 weights in the dtype of products, kept true by who updates the weights.

Under autocast every step casts every matrix. An optimizer that writes the copy in the pass that
updates the weight spares that: it lets the weights be *followed*, the first product makes the copy,
and every update writes it again. Whoever else changes a weight in place need not know: a copy
remembers which version of its weight it is of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

DTYPE = torch.bfloat16
"""Of every copy."""


@dataclass
class Copy:
    """A copy and the state of its weight that it is of; none yet without a tensor."""

    tensor: Tensor | None = None
    version: int = -1
    address: int = -1

    def is_of(self, weight: Tensor) -> bool:
        """Return whether the weight is still as the copy has it."""
        return self.version == weight._version and self.address == weight.data_ptr()

    def mark(self, weight: Tensor) -> None:
        """Say that the copy is of the weight as it is now."""
        self.version, self.address = weight._version, weight.data_ptr()


_followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def follow(weight: Tensor) -> None:
    """Have ``in_dtype`` keep the copy that it makes of a float32 weight.

    Only for who then updates the weight by ``kept_copy`` and ``Copy.mark``: otherwise a copy is
    made anew at every step as before, and takes memory besides.
    """
    if weight not in _followed:
        _followed[weight] = Copy()


def kept_copy(weight: Tensor) -> Copy | None:
    """Return the copy kept of a weight, to be updated with it; None where there is none."""
    copy = _followed.get(weight)
    return None if copy is None or copy.tensor is None else copy


def renew(weights: Iterable[Tensor]) -> None:
    """Make those copies anew whose weights have changed without them.

    For who reads copies where no ``in_dtype`` looks after them: a replayed CUDA graph.
    """
    for weight in weights:
        copy = kept_copy(weight)
        if copy is not None and not copy.is_of(weight):
            assert copy.tensor is not None
            copy.tensor.copy_(weight.detach())
            copy.mark(weight)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in a dtype, without a gradient: itself, its kept copy, or a new cast.

    Args:
        weight: Any float dtype; looked up by identity, so the parameter itself.
        dtype: Of the product.
    """
    if weight.dtype == dtype:
        return weight
    copy = None
    if dtype == DTYPE and not torch.compiler.is_compiling():
        copy = _followed.get(weight)
    if copy is None:
        return weight.detach().to(dtype)
    if copy.tensor is None:
        copy.tensor = weight.detach().to(dtype)
        copy.mark(weight)
    elif not copy.is_of(weight):
        copy.tensor = copy.tensor.copy_(weight.detach())
        copy.mark(weight)
    return copy.tensor
