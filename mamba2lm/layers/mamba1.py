"""Mamba-1, letter ``S``: the selective SSM S6 (Gu & Dao 2023, arXiv:2312.00752, §3).

Axes: b batch, l length, d model width, i inner width, r rank of Δ, n state, w convolution width.

B, C and Δ are made from x after the convolution, in sequence; every channel is its own SSM with a
diagonal A of N values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2lm import ops
from mamba2lm.distributed import Plan, Segment, Split, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers.initialization import sample_dt_bias
from mamba2lm.layers.mamba1_fused import fused_mamba1, unsupported
from mamba2lm.layers.mixer import (
    Mixer,
    MixerConfig,
    output_and_state,
    recurrent_dtype,
    register,
    require,
)
from mamba2lm.layers.norm import RMSNorm, compute_dtype
from mamba2lm.layers.state import State
from mamba2lm.ops.discretisation import step_sizes
from mamba2lm.ops.dispatch import note_taken
from mamba2lm.ops.flops import selective_scan_flops


class InnerNorm(Enum):
    """What is done to Δ (before its projection), B and C."""

    none = "none"
    """Nothing, as in the released Mambas."""
    plain = "plain"
    """RMSNorm without a weight (Falcon Mamba, Zuo et al. 2024, arXiv:2410.05355, §2.1)."""
    learned = "learned"
    """RMSNorm with a weight (Jamba, Lieber et al. 2024, arXiv:2403.19887, §6.4)."""


@dataclass
class Mamba1Config(MixerConfig):
    """Shape and initialisation of a Mamba-1 mixer (defaults: the released models)."""

    d_state: int = 16
    """N, the state per channel."""
    expand: float = 2
    """Inner width over model width."""
    d_conv: int = 4
    """Width of the causal convolution."""
    dt_rank: int | None = None
    """Rank of the projection that makes Δ; default d_model / 16, rounded up."""
    conv_bias: bool = True
    bias: bool = False
    """Biases on in_proj and out_proj."""
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    inner_norm: InnerNorm = InnerNorm.none
    """Normalise Δ, B and C: keeps large models from diverging."""
    inner_norm_eps: float = 1e-5

    def validate(self, d_model: int, key: str) -> None:
        require(self.d_state >= 1, f"{key}.d_state", self.d_state, "must be ≥ 1.")
        require(1 <= self.d_conv <= 4, f"{key}.d_conv", self.d_conv, "must be 1 to 4.")
        inner = self.expand * d_model
        require(
            inner == int(inner) and inner >= 1,
            f"{key}.expand",
            self.expand,
            f"expand·d_model = {inner:g} must be a whole number; change expand or model.d_model.",
        )
        require(
            self.dt_rank is None or self.dt_rank >= 1, f"{key}.dt_rank", self.dt_rank,
            "must be ≥ 1, or null for d_model / 16.",
        )  # fmt: skip
        require(
            0 < self.dt_min <= self.dt_max,
            f"{key}.dt_min",
            self.dt_min,
            f"must be positive and at most dt_max={self.dt_max}.",
        )


@register("mamba1", letter="S")
class Mamba1(Mixer):
    """Mamba-1 mixer."""

    config_class = Mamba1Config
    recurrent_tensors = ("ssm",)
    float32_parameters = ("A_log", "D", "dt_proj.bias")
    supports_context = True
    one_node_on_gpu = True

    def __init__(self, config: Mamba1Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_inner = int(config.expand * d_model)
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=config.bias)  # rows [x, z]
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner, bias=config.conv_bias
        )
        # Rows [dt, B, C].
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, config.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.d_inner, dtype=torch.float32))
        if config.inner_norm is InnerNorm.learned:
            self.dt_layernorm = RMSNorm(self.dt_rank, config.inner_norm_eps)
            self.b_layernorm = RMSNorm(config.d_state, config.inner_norm_eps)
            self.c_layernorm = RMSNorm(config.d_state, config.inner_norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)

    def init_weights(self) -> None:
        config = self.config
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        if config.inner_norm is InnerNorm.learned:
            for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm):
                norm.init_weights()
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(
                sample_dt_bias(
                    self.dt_proj.bias, config.dt_min, config.dt_max, config.dt_init_floor
                )
            )
            # S4D-real: A = −1, …, −N in every channel.
            self.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(
        self,
        x_bld: Tensor,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        if context is not None:
            return self._forward_stretch(x_bld, seq_idx_bl, context), None
        if state is None and torch.is_grad_enabled():
            x_bld = x_bld.to(compute_dtype(x_bld.device, x_bld.dtype))
            if self._fuses(x_bld):
                note_taken("mamba1", "one node of kernels")
                return self._forward_fused(x_bld, seq_idx_bl), None
        x_bli, z_bli = self.in_proj(x_bld).chunk(2, dim=-1)
        conv = ops.causal_conv1d(
            x_bli,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=None if state is None else state["conv"],
            seq_idx=seq_idx_bl,
            return_final_states=state is not None,
        )
        x_bli, conv_state = output_and_state(conv)
        dt_bli, B_bln, C_bln = self._select(x_bli)
        scan = ops.selective_scan(
            x_bli,
            dt_bli,
            -torch.exp(self.A_log),
            B_bln,
            C_bln,
            D=self.D,
            z=z_bli,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            initial_states=None if state is None else state["ssm"],
            seq_idx=seq_idx_bl,
            return_final_states=state is not None,
        )
        y_bli, ssm_state = output_and_state(scan)
        out_bld = self.out_proj(y_bli)
        if state is None or conv_state is None or ssm_state is None:
            return out_bld, None
        return out_bld, state.replace(conv=conv_state.to(state["conv"].dtype), ssm=ssm_state)

    def _fuses(self, x_bld: Tensor) -> bool:
        """Return whether the whole mixer can run as one autograd node of kernels."""
        if torch.compiler.is_compiling() or not x_bld.is_cuda or self.tensor is not None:
            return False
        plain = self.config.inner_norm is InnerNorm.none
        return plain and unsupported(x_bld, self.conv1d.weight.squeeze(1), self.A_log) is None

    def _forward_fused(self, x_bld: Tensor, seq_idx_bl: Tensor | None) -> Tensor:
        return fused_mamba1(
            x_bld, self.in_proj.weight, self.in_proj.bias,
            self.conv1d.weight.squeeze(1), self.conv1d.bias,
            self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D,
            self.out_proj.weight, self.out_proj.bias,
            seq_idx_bl=seq_idx_bl, keep_outputs=self.keep_outputs,
        )  # fmt: skip

    def _forward_stretch(
        self, x_bld: Tensor, seq_idx_bl: Tensor | None, context: Passage
    ) -> Tensor:
        """Run this process's stretch of longer sequences; see ``mamba2lm.distributed.context``."""
        x_bli, z_bli = self.in_proj(x_bld).chunk(2, dim=-1)
        x_bli = ops.causal_conv1d(
            x_bli,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=context.inputs_before(x_bli, self.config.d_conv - 1),
            seq_idx=seq_idx_bl,
        )
        dt_bli, B_bln, C_bln = self._select(x_bli)
        A_in = -torch.exp(self.A_log)

        def scan(x_bli: Tensor, entering_bin: Tensor | None) -> tuple[Tensor, Tensor]:
            return ops.selective_scan(
                x_bli,
                dt_bli,
                A_in,
                B_bln,
                C_bln,
                D=self.D,
                z=z_bli,
                dt_bias=self.dt_proj.bias,
                dt_softplus=True,
                initial_states=entering_bin,
                seq_idx=seq_idx_bl,
                return_final_states=True,
            )

        # Twice: every channel and state decays by itself, so what an entering state adds to the
        # outputs costs as much as the scan.
        _, left_bin = scan(x_bli, None)
        delta_bli = step_sizes(dt_bli, dt_bias=self.dt_proj.bias, dt_softplus=True)
        log_decay_bin = delta_bli.to(left_bin.dtype).sum(dim=1).unsqueeze(2) * A_in
        y_bli, _ = scan(x_bli, context.entering_state(left_bin, log_decay_bin))
        return self.out_proj(y_bli)

    def step(self, x_bd: Tensor, state: State) -> tuple[Tensor, State]:
        return self._step(x_bd, state), state

    def step_block(self, x_bd: Tensor, norm: RMSNorm, state: State) -> tuple[Tensor, State]:
        return self._step(x_bd, state, norm, residual_bd=x_bd), state

    def _step(
        self,
        x_bd: Tensor,
        state: State,
        norm: RMSNorm | None = None,
        residual_bd: Tensor | None = None,
    ) -> Tensor:
        """Run one token: five kernels on a GPU for few rows."""
        xz_bi = ops.linear_step(
            x_bd,
            self.in_proj.weight,
            self.in_proj.bias,
            norm=None if norm is None else ops.Norm(norm.weight, norm.eps),
            convolution=ops.Convolution(
                state["conv"], self.conv1d.weight.squeeze(1), self.conv1d.bias
            ),
        )
        x_bi, z_bi = xz_bi.chunk(2, dim=-1)
        dt_bi, B_bn, C_bn = self._select(x_bi, ops.linear_step)
        y_bi, _ = ops.selective_state_update(
            state["ssm"],
            x_bi,
            dt_bi,
            self.A_log,
            B_bn,
            C_bn,
            D=self.D,
            z=z_bi,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            A_is_log=True,
            in_place=True,
            early=True,  # a projection comes before
        )
        return ops.linear_step(
            y_bi, self.out_proj.weight, self.out_proj.bias, residual=residual_bd, in_place=True
        )

    def _select(
        self,
        x: Tensor,
        linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make Δ (…, i; before bias and softplus), B (…, n) and C (…, n) from x (…, i)."""
        n = self.config.d_state
        selected = linear(x, self.x_proj.weight)
        if self.tensor is not None:
            selected = self.tensor.sum(selected)
        dt_r, B, C = selected.split([self.dt_rank, n, n], dim=-1)
        if self.config.inner_norm is InnerNorm.plain:
            eps = self.config.inner_norm_eps
            dt_r, B, C = (ops.rms_norm(t, t.new_ones(t.shape[-1]), eps=eps) for t in (dt_r, B, C))
        elif self.config.inner_norm is InnerNorm.learned:
            # In the activations' dtype: under autocast the norms' weights are float32.
            dt_r = self.dt_layernorm(dt_r).to(dt_r.dtype)
            B, C = self.b_layernorm(B).to(B.dtype), self.c_layernorm(C).to(C.dtype)
        return linear(dt_r, self.dt_proj.weight), B, C

    def new_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        weight, config = self.out_proj.weight, self.config
        device = device or weight.device
        return State(
            conv=torch.zeros(
                batch, config.d_conv - 1, self.d_inner, dtype=dtype or weight.dtype, device=device
            ),
            ssm=torch.zeros(
                batch,
                self.d_inner,
                config.d_state,
                dtype=recurrent_dtype(weight.dtype),
                device=device,
            ),
        )

    def residual_weight(self) -> Tensor:
        return self.out_proj.weight

    def flops_per_token(self, length: int) -> float:
        layers = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        projections = 2 * sum(layer.weight.numel() for layer in layers)
        convolution = 2 * self.config.d_conv * self.d_inner
        scan = selective_scan_flops(
            batch=1, length=length, d_inner=self.d_inner, d_state=self.config.d_state
        )
        return projections + convolution + scan / length

    def kept_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.d_inner * itemsize

    def tensor_plan(self) -> Plan:
        channels = Segment(self.d_inner)
        rows, columns = Split((channels,)), Split((channels,), dim=1)
        plan = {
            "in_proj.weight": Split((channels, channels)),
            "conv1d.weight": rows,
            "x_proj.weight": columns,
            "dt_proj.weight": rows,
            "dt_proj.bias": rows,
            "A_log": rows,
            "D": rows,
            "out_proj.weight": columns,
        }
        if self.config.conv_bias:
            plan["conv1d.bias"] = rows
        if self.config.bias:
            plan["in_proj.bias"] = Split((channels, channels))
            plan["out_proj.bias"] = Split((Segment(self.d_model),), once=True)
        if self.config.inner_norm is InnerNorm.learned:
            # Every process norms the same Δ, B and C, but for its own channels: the weights'
            # gradients are parts of a sum, as those of a group's rows that all processes share.
            widths = {"dt": self.dt_rank, "b": self.config.d_state, "c": self.config.d_state}
            for name, width in widths.items():
                shared = Segment(1, width, shared_by=self.d_inner)
                plan[f"{name}_layernorm.weight"] = Split((shared,))
        return plan

    def take_part(self, tensor: TensorGroup) -> None:
        self.tensor = tensor
        self.d_inner //= tensor.size
