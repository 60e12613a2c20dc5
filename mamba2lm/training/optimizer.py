"""Optimizers: AdamW, or Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mamba2lm.models import LanguageModel
from mamba2lm.models.checkpoint import StoredTensors
from mamba2lm.models.sharding import ModelLayout
from mamba2lm.ops.adamw.launch import unsupported
from mamba2lm.schema import ConfigError
from mamba2lm.training.adamw import AdamW
from mamba2lm.training.muon import Muon
from mamba2lm.training.parallelize import to_local


class OptimizerKind(Enum):
    """Which update rule."""

    adamw = "adamw"
    muon = "muon"


class AdamWImpl(Enum):
    """What AdamW's step runs on."""

    auto = "auto"
    """The kernel on a GPU, else PyTorch's."""
    triton = "triton"
    """The kernel: clipping, update and the weights' copies in half precision in one pass."""
    torch = "torch"
    """PyTorch's fused AdamW, after a pass that clips."""


@dataclass
class OptimizerConfig:
    """Peak learning rate, decay and moments."""

    kind: OptimizerKind = OptimizerKind.adamw
    learning_rate: float = 1e-3
    """Peak; of muon too, whose updates are scaled to AdamW's root mean square (Liu et al. 2025)."""
    weight_decay: float = 0.1
    """On matrices only: never on norms, biases, A_log, D or the Δ bias."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    momentum: float = 0.95
    """muon only."""
    adamw_scale: float = 1.0
    """muon only: learning rate of what AdamW keeps (embedding, head, vectors) over muon's."""
    impl: AdamWImpl = AdamWImpl.auto
    """Of AdamW; states and checkpoints are the same."""

    def validate(self) -> None:
        """Check ranges; raise ConfigError."""
        if not self.learning_rate > 0:
            raise ConfigError("optimizer.learning_rate", self.learning_rate, "must be positive.")
        if self.weight_decay < 0:
            raise ConfigError("optimizer.weight_decay", self.weight_decay, "must be ≥ 0.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "must be two numbers in [0, 1).")


class Optimizers:
    """The optimizers of a run, stepped together, with state that is plain named tensors."""

    def __init__(self, config: OptimizerConfig, model: LanguageModel) -> None:
        self.config = config
        self.names: dict[Tensor, str] = {}
        self._divided: list[tuple[nn.Parameter, nn.Parameter]] = []
        """DTensors, and the same storage as plain parameters, which are what AdamW updates."""
        self._parameters = list(model.parameters())
        stepped: dict[str, nn.Parameter] = {}
        kinds = _kinds(config, model)
        for name, parameter in model.named_parameters():
            stepped[name] = parameter
            if isinstance(parameter, DTensor) and kinds.get(name) != "muon":
                # An update of many DTensors takes the host longer than a layer takes the device.
                stepped[name] = nn.Parameter(
                    parameter._local_tensor.detach(), requires_grad=parameter.requires_grad
                )
                self._divided.append((parameter, stepped[name]))
            self.names[stepped[name]] = name
        self.each = build_optimizers(config, model, stepped)

    def set_learning_rate(self, rate: float) -> None:
        """Set every group's rate, keeping the groups' ratios."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale what the next step sees of the gradients to a total norm of at most ``max_norm``.

        Args:
            norm: Theirs now, over all processes; a scalar on their device, which need not be known
                to the host yet.
            max_norm: A positive number.
        """
        self._meet_gradients()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for optimizer in self.each:
            if isinstance(optimizer, AdamW):
                optimizer.prepare(factor.float())
                continue
            gradients = [
                to_local(parameter.grad)
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            if gradients:
                torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
                    gradients, factor.to(gradients[0].dtype)
                )

    def step(self) -> None:
        """Update the parameters."""
        self._meet_gradients()
        for optimizer in self.each:
            optimizer.step()

    def _meet_gradients(self) -> None:
        """Give the plain parameters that stand for DTensors what these have."""
        for parameter, local in self._divided:
            # FSDP2 may have moved what does not divide evenly, when it was first used.
            local.data = parameter._local_tensor  # type: ignore[attr-defined]
            local.grad = None if parameter.grad is None else to_local(parameter.grad)

    def zero_grad(self) -> None:
        """Drop the gradients, and a step that was prepared with them."""
        for parameter in self._parameters:
            parameter.grad = None
        for _, local in self._divided:
            local.grad = None
        for optimizer in self.each:
            if isinstance(optimizer, AdamW):
                optimizer.forget()

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield every state tensor with its parameter's name and its own."""
        for optimizer in self.each:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        yield self.names[parameter], key, value.detach()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a copy of every state tensor as ``<parameter name>::<state name>``, on the CPU."""
        # Copies: parameters may share what counts their steps.
        return {
            f"{n}::{key}": value.to("cpu", copy=True).contiguous()
            for n, key, value in self.tensors()
        }

    def load(self, stored: StoredTensors, layout: ModelLayout | None) -> None:
        """Restore what was saved as ``<parameter name>::<state name>``.

        Args:
            stored: The tensors, whole or in the pieces of whatever layout wrote them.
            layout: Which part of each parameter this process has; None when it has all.

        Raises:
            ValueError: A tensor belongs to no parameter of these optimizers, or is incomplete.
        """
        owner = {
            self.names[parameter]: (optimizer, parameter)
            for optimizer in self.each
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for full, shape in stored.shapes.items():
            name, key = full.rsplit("::", 1)
            if name not in owner:
                raise ValueError(f"optimizer state for unknown parameter {name}")
            optimizer, parameter = owner[name]
            if not shape:  # step counters stay where the optimizer made them
                device = parameter.device if _fused(optimizer) else torch.device("cpu")
                optimizer.state[parameter][key] = stored.read(full).to(device)
            elif layout is None:
                optimizer.state[parameter][key] = stored.read(full).to(parameter.device)
            else:
                state = torch.zeros_like(parameter.detach())
                local = state._local_tensor if isinstance(state, DTensor) else state
                stored.fill(local, full, layout.pieces(name))
                optimizer.state[parameter][key] = state


def build_optimizers(
    config: OptimizerConfig,
    model: LanguageModel,
    stepped: Mapping[str, nn.Parameter] | None = None,
) -> list[torch.optim.Optimizer]:
    """Split the parameters into groups and build the optimizer of each kind.

    Weight decay falls on weights of two or more axes (embedding included), except those the mixers
    keep in float32. Muon takes the matrices inside the blocks.

    Args:
        config: Kinds and settings.
        model: Whose parameters.
        stepped: By name, what is updated in a parameter's place.
    """
    parameters = dict(model.named_parameters()) if stepped is None else stepped
    by_kind: dict[str, list[nn.Parameter]] = {"muon": [], "decayed": [], "plain": []}
    for name, kind in _kinds(config, model).items():
        by_kind[kind].append(parameters[name])
    scale = config.adamw_scale if config.kind is OptimizerKind.muon else 1.0
    groups = [
        {"params": alike, "weight_decay": decay, "lr_scale": scale}
        for alike, decay in ((by_kind["decayed"], config.weight_decay), (by_kind["plain"], 0.0))
        if alike
    ]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
    }
    optimizers: list[torch.optim.Optimizer] = []
    if groups:  # with LoRA under Muon there are matrices inside the blocks alone
        optimizers.append(
            AdamW(groups, **settings)
            if _takes_kernel(config.impl, [p for group in groups for p in group["params"]])
            else torch.optim.AdamW(groups, **settings, fused=True)
        )
    if by_kind["muon"]:
        optimizers.append(
            Muon(
                [{"params": by_kind["muon"], "lr_scale": 1.0}],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
            )
        )
    return optimizers


def _kinds(config: OptimizerConfig, model: LanguageModel) -> dict[str, str]:
    """Return how every parameter that learns is updated: "muon", "decayed" or "plain"."""
    exempt = model.float32_parameters()
    kinds = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # frozen beside a LoRA
        if name in exempt or parameter.ndim < 2 or name.endswith("conv1d.weight"):
            kinds[name] = "plain"
        elif config.kind is OptimizerKind.muon and name.startswith("layers."):
            kinds[name] = "muon"
        else:
            kinds[name] = "decayed"
    return kinds


def _takes_kernel(impl: AdamWImpl, parameters: Sequence[Tensor]) -> bool:
    """Return whether the kernel updates these parameters."""
    if impl is AdamWImpl.torch or not parameters:
        return False
    reason = next((why for p in parameters if (why := unsupported(p)) is not None), None)
    if impl is AdamWImpl.triton and reason is not None:
        raise ConfigError("optimizer.impl", "triton", f"{reason}; use auto or torch.")
    # The interpreter's parameters lie on a CPU: tests ask for the kernel by name.
    return reason is None and (impl is AdamWImpl.triton or parameters[0].is_cuda)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)
