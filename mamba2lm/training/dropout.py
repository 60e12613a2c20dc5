"""Dropout, applied to a model from outside (Srivastava et al. 2014).

What each sub-layer adds to the residual stream, and the embedding, lose a share of their numbers at
random, as in GPT-2 and nanoGPT (attention's weights are left alone). Small data are seen many times
over, and a model that would learn them by heart stays good for longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2lm.models import LanguageModel


class Dropout:
    """Hooks that drop numbers while a model trains."""

    def __init__(self, model: LanguageModel, share: float, *, seed: int, rank: int = 0) -> None:
        """Attach to a model; nothing changes while it is in evaluation mode.

        Args:
            model: Whole on this process: parts of a sum cannot be dropped one by one.
            share: Of the numbers, in [0, 1); the others are scaled by 1 / (1 − share).
            seed: The run's.
            rank: Processes of different ranks drop different numbers.
        """
        self.share, self.seed, self.rank = share, seed, rank
        model.draws = True
        modules: list[nn.Module] = [model.embedding, *(block.mixer for block in model.blocks)]
        self.handles = [module.register_forward_hook(self._drop) for module in modules]

    def begin_step(self, step: int) -> None:
        """Make what is dropped a function of seed, step and rank, however the run came here."""
        sequence = np.random.SeedSequence([self.seed, step, self.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)

    def _drop(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not module.training:
            return None
        if isinstance(output, Tensor):
            return F.dropout(output, self.share)
        y_bld, state = output
        return F.dropout(y_bld, self.share), state
