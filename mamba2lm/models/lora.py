"""LoRA: train a low-rank difference to frozen matrices (Hu et al. 2021, arXiv:2106.09685).

A layer keeps its class's behaviour and its parameters' names. Only what reading ``weight`` gives
changes: W + (α / r) B A, whoever reads it, a module's own forward or a fused operator. So nothing
else in the program knows of it, and checkpoints hold W, A and B side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mamba2lm.models.language_model import LanguageModel
from mamba2lm.schema import ConfigError, closest

_KNOWN = ("in_proj", "x_proj", "out_proj", "fc1", "fc2")


@dataclass
class LoRAConfig:
    """Which matrices get a difference, and of what rank."""

    rank: int = 0
    """r; 0 trains every weight instead."""
    alpha: float = 16.0
    """The difference is scaled by α / r."""
    targets: list[str] = field(default_factory=lambda: list(_KNOWN))
    """Names of the mixers' matrices, as far as a mixer has them."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        if self.rank < 0:
            raise ConfigError("lora.rank", self.rank, "must be ≥ 0; 0 is off.")
        if not self.alpha > 0:
            raise ConfigError("lora.alpha", self.alpha, "must be positive.")
        for name in self.targets:
            if name not in _KNOWN:
                raise ConfigError(
                    "lora.targets",
                    name,
                    f"no such matrix.{closest(name, _KNOWN)} Known: {', '.join(_KNOWN)}.",
                )


class LoRALinear(nn.Linear):
    """A linear layer whose weight is W + scale · B A; W does not learn."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that is used, (out, in).

        Between uses, FSDP2 keeps a part of W in its place and looks for it by this name; taking a
        sum for W, it would train that instead, W with it.
        """
        base = cast(Tensor, self._parameters["weight"])
        if isinstance(base, DTensor):
            return base
        return base + self.lora_scale * (self.lora_B @ self.lora_A)


def add_lora(model: LanguageModel, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freeze a model and give its target matrices a difference of zero that learns.

    Args:
        model: Changed in place.
        config: With a rank above 0.
        seed: Of A; B begins at zero.

    Raises:
        ConfigError: The model has none of the targets.
    """
    assert config.rank > 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.blocks:
            for name in config.targets:
                layer = getattr(block.mixer, name, None)
                if isinstance(layer, nn.Linear):
                    _adapt(layer, config)
                    found = True
    if not found:
        raise ConfigError("lora.targets", config.targets, "the model has none of these matrices.")


def merge_lora(model: LanguageModel) -> None:
    """Add every difference to its matrix: the model is a plain one again."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            with torch.no_grad():
                merged = layer.weight.detach().clone()
            del layer.lora_A, layer.lora_B
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            cast(nn.Parameter, layer._parameters["weight"]).data = merged
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _adapt(layer: nn.Linear, config: LoRAConfig) -> None:
    weight, rank = layer.weight, config.rank
    lora_A = torch.empty(rank, layer.in_features, dtype=weight.dtype, device=weight.device)
    lora_B = torch.zeros(layer.out_features, rank, dtype=weight.dtype, device=weight.device)
    if not weight.is_meta:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    layer.__class__ = LoRALinear  # type: ignore[assignment]
    adapted = cast(LoRALinear, layer)
    adapted.lora_A, adapted.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    adapted.lora_scale = config.alpha / rank
