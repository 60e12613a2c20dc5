"""MLP, letter ``F``: SwiGLU (Shazeer 2020, arXiv:2002.05202), or squared ReLU without a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2lm import ops
from mamba2lm.distributed import Plan, Segment, Split, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers.linear import project
from mamba2lm.layers.mixer import Mixer, MixerConfig, register, require
from mamba2lm.layers.state import State


class Activation(Enum):
    """What stands between the two matrices."""

    swiglu = "swiglu"
    """silu(gate) · up, both made by the first matrix."""
    relu2 = "relu2"
    """relu(up)², no gate (So et al. 2021, arXiv:2109.08668)."""


@dataclass
class MLPConfig(MixerConfig):
    """Shape of an MLP."""

    d_ff: int | None = None
    """Hidden width; default 8/3 of d_model (4 without a gate), up to a multiple of 128."""
    bias: bool = False
    activation: Activation = Activation.swiglu

    def width(self, d_model: int) -> int:
        """Return the hidden width for a model width."""
        thirds = 8 if self.activation is Activation.swiglu else 12
        return self.d_ff or 128 * math.ceil(thirds * d_model / 3 / 128)

    def validate(self, d_model: int, key: str) -> None:
        require(
            self.d_ff is None or self.d_ff >= 1, f"{key}.d_ff", self.d_ff,
            "must be ≥ 1, or null for 8/3 of d_model (4 without a gate).",
        )  # fmt: skip


@register("mlp", letter="F")
class MLP(Mixer):
    """Position-wise ``fc2(silu(gate) · up)`` or ``fc2(relu(up)²)``; carries no state."""

    config_class = MLPConfig
    supports_context = True

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_ff = config.width(d_model)
        self.gated = config.activation is Activation.swiglu
        # Rows [gate, up], or up alone.
        self.fc1 = nn.Linear(d_model, self.d_ff * (2 if self.gated else 1), bias=config.bias)
        self.fc2 = nn.Linear(self.d_ff, d_model, bias=config.bias)

    def init_weights(self) -> None:
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(
        self,
        x_bld: Tensor,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        hidden = project(self.fc1, x_bld)
        if not self.gated:
            return project(self.fc2, F.relu(hidden).square()), state
        return project(self.fc2, ops.swiglu(hidden)), state

    def step(self, x_bd: Tensor, state: State) -> tuple[Tensor, State]:
        return self.forward(x_bd)[0], state

    def new_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        return State()

    def residual_weight(self) -> Tensor:
        return self.fc2.weight

    def flops_per_token(self, length: int) -> float:
        return 2 * (self.fc1.weight.numel() + self.fc2.weight.numel())

    def tensor_plan(self) -> Plan:
        channels = Segment(self.d_ff)
        first = Split((channels, channels) if self.gated else (channels,))
        plan = {"fc1.weight": first, "fc2.weight": Split((channels,), dim=1)}
        if self.config.bias:
            plan["fc1.bias"] = first
            plan["fc2.bias"] = Split((Segment(self.d_model),), once=True)
        return plan

    def take_part(self, tensor: TensorGroup) -> None:
        self.tensor = tensor
        self.d_ff //= tensor.size
