"""Small models with every kind of mixer, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba2lm.models import LanguageModel, ModelConfig

VOCAB = 50
PATTERNS = ("MM", "SS", "AF", "MSAF")


def small_config(pattern: str, *, vocab_size: int = VOCAB, **fields: Any) -> ModelConfig:
    """Return a valid configuration of width 32."""
    config = ModelConfig(pattern=pattern, d_model=32, vocab_size=vocab_size, **fields)
    config.mixers["M"].update(d_state=8, headdim=16, chunk_size=8)
    config.mixers["S"].update(d_state=4)
    config.mixers["A"].update(n_heads=4, n_kv_heads=2)
    config.mixers["F"].update(d_ff=40)
    config.validate()
    return config


def small_model(
    pattern: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> LanguageModel:
    """Return a model with initial weights, in training mode."""
    model = LanguageModel(small_config(pattern, **fields))
    model.init_weights(seed)
    return model.cast(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random ids, (b, l) int64."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
