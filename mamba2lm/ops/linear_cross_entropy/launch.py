"""Launch the Triton kernel of the softmax and its gradient, as a PyTorch custom operator.

Triton itself is imported on the first launch, so that this module imports everywhere.

Letters: s tokens, v vocabulary (padded).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.kernels import Launches, on_device

ALIGNED = 8
"""Elements by which stride and width are divided where they can be; see ``softmax.py``."""


@dataclass(frozen=True)
class Blocks:
    """How the kernel is launched; changes speed, and the loss by the order of its sum."""

    elements: int = 8192
    """Logits at a time, a power of two."""
    warps: int = 16
    """Many, so that few rows are on their way and the second reading finds them in the cache."""
    registers: int | None = 64
    """The most that a thread may use, so that two programs fit on a multiprocessor of NVIDIA's."""
    stages: int = 1
    """Depth of software pipelining over the first reading."""


TUNED = Blocks()

_override: Blocks | None = None


def override_blocks(blocks: Blocks | None) -> None:
    """Use these for every call until told otherwise (tests and tuning)."""
    global _override
    _override = blocks


@lru_cache
def _kernel() -> Any:
    """Import the kernel, and Triton with it."""
    softmax = importlib.import_module("mamba2lm.ops.linear_cross_entropy.softmax")
    return softmax.softmax_gradient_kernel


def softmax_gradient(
    logits_sv: Tensor, labels_s: Tensor, vocab_size: int, ignore_index: int, gradient: bool
) -> Tensor:
    """Return each token's cross-entropy, and overwrite its logits with their gradient.

    Args:
        logits_sv: (s, v), unit stride along v; bfloat16, float16 or float32.
        labels_s: Target ids, (s,), int64, below ``vocab_size`` or ``ignore_index``.
        vocab_size: Logits that are real; the gradient of the rest is zero.
        ignore_index: Label of tokens without loss and gradient.
        gradient: Whether to overwrite; otherwise the logits stay as they are.

    Returns:
        Losses in nats, (s,), float32.
    """
    assert logits_sv.stride(1) == 1
    rows, padded = logits_sv.shape
    loss_s = torch.empty(rows, dtype=torch.float32, device=logits_sv.device)
    blocks = TUNED if _override is None else _override
    labels_s = labels_s.contiguous()
    stride = logits_sv.stride(0)
    unit = ALIGNED if (stride | padded) % ALIGNED == 0 else 1
    # Chunks differ in their number of tokens, on which nothing compiled depends.
    aligned = logits_sv.data_ptr() % 16, labels_s.data_ptr() % 16
    key = (logits_sv.dtype, aligned, unit, gradient)
    launch = Launches(logits_sv.device, "softmax_gradient", blocks, *key)
    with on_device(logits_sv.device):
        launch(
            _kernel(), (rows, 1, 1),
            logits_sv, labels_s, loss_s, stride // unit, vocab_size, padded // unit, ignore_index,
            warps=blocks.warps, registers=None if torch.version.hip else blocks.registers,
            GRADIENT=gradient, BLOCK=blocks.elements, UNIT=unit,
            STAGES=blocks.stages,
        )  # fmt: skip
    return loss_s


softmax_gradient_op = torch.library.custom_op(
    "mamba2lm::softmax_gradient", softmax_gradient, mutates_args=("logits_sv",)
)


@softmax_gradient_op.register_fake
def _(logits_sv: Tensor, *_: Any) -> Tensor:
    return logits_sv.new_empty(logits_sv.shape[0], dtype=torch.float32)
