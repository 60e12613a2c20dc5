"""Launch the Triton kernel of AdamW over many tensors at once.

Triton itself is imported on the first launch, so that this module imports everywhere. ``Update``
is made before it is known whether a step is to be taken, and then launched in microseconds: what
the host does between a step's loss and its update, the device waits for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.adamw.reference import Settings
from mamba2lm.ops.kernels import Launches, no_kernels, on_device


@dataclass(frozen=True)
class Blocks:
    """How the kernel is launched; changes speed only."""

    elements: int = 1024
    """Of a block, a power of two."""
    blocks: int = 4
    """Blocks of a program."""
    warps: int = 8


TUNED = Blocks()

_override: Blocks | None = None


def override_blocks(blocks: Blocks | None) -> None:
    """Use these for every update until told otherwise (tests and tuning)."""
    global _override
    _override = blocks


def unsupported(parameter: Tensor) -> str | None:
    """Say why the kernel cannot update a parameter, or None when it can."""
    if (reason := no_kernels(parameter)) is not None:
        return reason
    if parameter.dtype != torch.float32:
        return f"the parameter has dtype {parameter.dtype}; the kernel takes float32"
    if not parameter.is_contiguous():
        return "the parameter is not contiguous"
    return None


@lru_cache
def _kernel() -> Any:
    """Import the kernel, and Triton with it."""
    return importlib.import_module("mamba2lm.ops.adamw.kernels").adamw_kernel


@dataclass(frozen=True)
class Chunks:
    """Which program works where, for tensors of given sizes."""

    size: Tensor
    """Elements by tensor, int64."""
    owner: Tensor
    """Tensor by program, int32."""
    place: Tensor
    """Which chunk of it, int32."""

    @staticmethod
    @lru_cache(maxsize=16)
    def of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Chunks:
        """Cut tensors into chunks."""
        size = torch.tensor(sizes)
        count = -(-size // chunk)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), count)
        place = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
        return Chunks(size.to(device), owner.int().to(device), place.int().to(device))


class Update:
    """One step of AdamW on many tensors, prepared."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        copies: Sequence[Tensor | None],
        factor: Tensor | None = None,
    ) -> None:
        """Bring the addresses of the tensors to the device.

        Args:
            parameters: float32, contiguous, on one device; at least one.
            gradients: Of the same shapes, as all that follow; float32.
            first: Running means of the gradients, float32, contiguous.
            second: Running means of their squares, likewise.
            copies: What receives each parameter in bfloat16, contiguous, or None.
            factor: What gradients are multiplied by, a float32 scalar on the device; None: 1.
        """
        self._device = parameters[0].device
        self._blocks = TUNED if _override is None else _override
        # Held, so that what the addresses mean outlives them.
        self._gradients = [gradient.contiguous() for gradient in gradients]
        self._factor = factor
        self._copied = any(copy is not None for copy in copies)
        rows = (parameters, self._gradients, first, second)
        addresses = [tensor.data_ptr() for row in rows for tensor in row]
        addresses += [0 if copy is None else copy.data_ptr() for copy in copies]
        self._aligned = all(address % 16 == 0 for address in addresses)
        assert factor is None or factor.data_ptr() % 16 == 0, "the factor is a part of something"
        table = torch.tensor(addresses, dtype=torch.int64)
        if self._device.type == "cuda":
            table = table.pin_memory()
        self._table = table.to(self._device, non_blocking=True)
        sizes = tuple(parameter.numel() for parameter in parameters)
        self._chunks = Chunks.of(sizes, self._blocks.elements * self._blocks.blocks, self._device)

    def launch(self, settings: Settings) -> None:
        """Take the step: parameters, both moments and copies change in place.

        Autograd does not see it; ``torch.autograd.graph.increment_version`` tells it.
        """
        s, blocks, chunks = settings, self._blocks, self._chunks
        if len(chunks.owner) == 0:  # this process has no part of these
            return
        factor = chunks.size if self._factor is None else self._factor
        key = (blocks, self._factor is None, self._copied, self._aligned)
        launch = Launches(self._device, "adamw", *key)
        with on_device(self._device):
            launch(
                _kernel(), (len(chunks.owner), 1, 1),
                self._table, chunks.size, chunks.owner, chunks.place, factor,
                len(chunks.size), 1 - s.rate * s.weight_decay,
                s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2,
                s.rate / (1 - s.beta1**s.step), 1 / math.sqrt(1 - s.beta2**s.step), s.eps,
                warps=blocks.warps,
                HAS_FACTOR=self._factor is not None, HAS_COPY=self._copied,
                ALIGNED=self._aligned, BLOCK=blocks.elements, BLOCKS=blocks.blocks,
            )  # fmt: skip
