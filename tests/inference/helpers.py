"""Tiny real models with random weights whose output is far from uniform, and runs holding them."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mamba2lm.data import Tokenizer
from mamba2lm.data.sources import CARRIED
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.checkpoint import checkpoint_path, save_weights, write_checkpoint
from mamba2lm.schema import from_mapping

MIXERS: dict[str, Any] = {
    "M": {"type": "mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "chunk_size": 8},
    "S": {"type": "mamba1", "d_state": 8},
    "A": {"type": "attention", "head_dim": 16, "n_heads": 4, "n_kv_heads": 2},
    "W": {"type": "attention", "head_dim": 16, "n_heads": 2, "window": 7, "d_conv": 4},
    "F": {"type": "mlp", "d_ff": 48},
}
PATTERNS = ["MM", "SS", "AF", "MA", "WF", "MSWF"]
CONSTANT = ["MM", "SS", "WF", "MSWF"]


@cache
def corpus() -> str:
    """Return the first 200,000 characters of the carried corpus."""
    with lzma.open(CARRIED["austen"], "rt", encoding="utf-8") as file:
        return file.read(200_000)


@cache
def tokenizer() -> Tokenizer:
    """Return a BPE of 500 ids trained on the carried corpus; a model pads them to 512."""
    return Tokenizer.train([corpus()], 500)


def model_config(pattern: str, vocab_size: int = 500) -> ModelConfig:
    """Return a tiny shape."""
    values = {
        "pattern": pattern,
        "d_model": 32,
        "vocab_size": vocab_size,
        "tie_embeddings": False,
        "mixers": MIXERS,
    }
    return from_mapping(ModelConfig, values, "model")


def model(
    pattern: str, *, vocab_size: int = 500, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Return a model whose next token depends on the whole context and is rarely in doubt."""
    built = LanguageModel(model_config(pattern, vocab_size))
    built.init_weights(seed)
    with torch.no_grad():
        built.embedding.weight.mul_(50)
        for block in built.blocks:
            block.mixer.residual_weight().mul_(8)
        built.lm_head.weight.mul_(40)
    return built.cast(dtype).eval()


def write_run(
    run_dir: Path,
    built: LanguageModel,
    with_tokenizer: Tokenizer | None,
    *,
    step: int = 7,
    data: dict[str, Any] | None = None,
) -> Path:
    """Write a run folder with one checkpoint; return the run folder."""
    config = {
        "model": built.config.resolved(),
        "data": {"sequence_length": 24, **(data or {})},
        "training": {"seed": 3},
    }

    def fill(folder: Path) -> None:
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        save_weights(built, folder)
        if with_tokenizer is not None:
            with_tokenizer.save(folder / "tokenizer")

    write_checkpoint(checkpoint_path(run_dir, step), fill)
    return run_dir
