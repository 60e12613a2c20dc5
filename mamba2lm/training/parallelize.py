"""What is done to a single-device model before it trains: recompute, compile, replicate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from mamba2lm.models import LanguageModel


def start_accelerator() -> Accelerator:
    """Join the processes that torchrun or accelerate started, on a GPU each or on the CPU.

    Mixed precision stays ours (``trainer.autocast``): Accelerate's rewrites the model's forward,
    and sampling between steps would then differ from a loaded checkpoint's.
    """
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


def parallelize(
    model: LanguageModel, accelerator: Accelerator, *, activation_checkpointing: bool, compile: bool
) -> nn.Module:
    """Prepare a model for training on this process's device, among the others.

    Args:
        model: The model, on the CPU or the device.
        accelerator: Knows the processes.
        activation_checkpointing: Keep only each block's input and recompute the rest in backward.
        compile: Compile each block with torch.compile (one graph serves all alike blocks).

    Returns:
        The model to call in training: the same one, or wrapped so that gradients are averaged.
    """
    model.activation_checkpointing = activation_checkpointing
    if compile:
        for block in model.blocks:
            block.compile()
    return accelerator.prepare_model(model)
