"""Mamba-2, letter ``M``: gated state-space duality (Dao & Gu 2024, arXiv:2405.21060, §7).

Axes: b batch, l length, d model width, i inner width (= heads · head dim), h heads, p head dim,
g groups, n state, w convolution width, c convolved channels (x, B and C side by side).

One projection gives z, x, B, C and Δ in parallel; a short causal convolution runs over x|B|C; the
SSD operator mixes along time; the result is gated by SiLU(z), normalised in groups, projected out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mamba2lm import ops
from mamba2lm.distributed import Plan, Segment, Split, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers.initialization import sample_dt_bias
from mamba2lm.layers.mamba2_fused import Divided, Sizes, fused_mamba2, unsupported
from mamba2lm.layers.mixer import (
    Mixer,
    MixerConfig,
    output_and_state,
    recurrent_dtype,
    register,
    require,
)
from mamba2lm.layers.norm import GatedRMSNorm, RMSNorm, compute_dtype
from mamba2lm.layers.state import State
from mamba2lm.ops.discretisation import step_sizes
from mamba2lm.ops.dispatch import note_taken
from mamba2lm.ops.flops import ssd_flops
from mamba2lm.ops.ssd.carry import running_sum


@dataclass
class Mamba2Config(MixerConfig):
    """Shape and initialisation of a Mamba-2 mixer (defaults: the released models)."""

    d_state: int = 128
    """N, the state per head and channel."""
    headdim: int = 64
    """P, channels per head."""
    expand: float = 2
    """Inner width over model width."""
    ngroups: int = 1
    """G, groups of heads that share B and C."""
    d_conv: int = 4
    """Width of the causal convolution."""
    chunk_size: int = 64
    """Q, positions per chunk of the SSD algorithm: speed only, never the result."""
    conv_bias: bool = True
    bias: bool = False
    """Biases on in_proj and out_proj."""
    A_init_range: list[float] = field(default_factory=lambda: [1.0, 16.0])
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: list[float] = field(default_factory=lambda: [0.0, math.inf])
    """Clamp of Δ after the softplus."""
    norm_eps: float = 1e-5

    def validate(self, d_model: int, key: str) -> None:
        for name in ("d_state", "headdim", "ngroups", "chunk_size"):
            require(getattr(self, name) >= 1, f"{key}.{name}", getattr(self, name), "must be ≥ 1.")
        require(1 <= self.d_conv <= 4, f"{key}.d_conv", self.d_conv, "must be 1 to 4.")
        inner = self.expand * d_model
        require(
            inner == int(inner) and int(inner) % self.headdim == 0,
            f"{key}.headdim",
            self.headdim,
            f"must divide the inner width expand·d_model = {inner:g}; "
            "change headdim, expand or model.d_model.",
        )
        heads = int(inner) // self.headdim
        require(
            heads % self.ngroups == 0,
            f"{key}.ngroups",
            self.ngroups,
            f"must divide the number of heads, {heads} (= expand·d_model / headdim).",
        )
        require(
            len(self.A_init_range) == 2 and 0 < self.A_init_range[0] <= self.A_init_range[1],
            f"{key}.A_init_range",
            self.A_init_range,
            "must be two positive numbers [low, high].",
        )
        require(
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] < self.dt_limit[1],
            f"{key}.dt_limit",
            self.dt_limit,
            "must be [low, high] with 0 ≤ low < high.",
        )
        require(
            0 < self.dt_min <= self.dt_max,
            f"{key}.dt_min",
            self.dt_min,
            f"must be positive and at most dt_max={self.dt_max}.",
        )


@register("mamba2", letter="M")
class Mamba2(Mixer):
    """Mamba-2 mixer."""

    config_class = Mamba2Config
    recurrent_tensors = ("ssm",)
    float32_parameters = ("A_log", "D", "dt_bias")
    supports_context = True
    one_node_on_gpu = True

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_inner = int(config.expand * d_model)
        self.n_heads = self.d_inner // config.headdim
        self.n_groups = config.ngroups
        self.d_groups = self.n_groups * config.d_state
        self.d_conv_in = self.d_inner + 2 * self.d_groups
        self.dt_limit = (config.dt_limit[0], config.dt_limit[1])

        # Rows in the released order [z, x, B, C, dt].
        self.in_proj = nn.Linear(
            d_model, self.d_inner + self.d_conv_in + self.n_heads, bias=config.bias
        )
        self.conv1d = nn.Conv1d(
            self.d_conv_in, self.d_conv_in, config.d_conv, groups=self.d_conv_in,
            bias=config.conv_bias,
        )  # fmt: skip
        self.A_log = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(self.d_inner, self.d_inner // config.ngroups, config.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)

    def init_weights(self) -> None:
        config = self.config
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self.out_proj.reset_parameters()
        self.norm.init_weights()
        with torch.no_grad():
            self.A_log.uniform_(*config.A_init_range).log_()
            self.D.fill_(1.0)
            self.dt_bias.copy_(
                sample_dt_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
            )

    def forward(
        self,
        x_bld: Tensor,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        if state is None and torch.is_grad_enabled():
            x_bld = x_bld.to(compute_dtype(x_bld.device, x_bld.dtype))
            if self._fuses(x_bld):
                note_taken("mamba2", "one node of kernels")
                return self._forward_fused(x_bld, seq_idx_bl, context), None
        if context is not None:
            return self._forward_stretch(x_bld, seq_idx_bl, context), None
        batch, length, _ = x_bld.shape
        z_bli, xBC_blc, dt_blh = self._project(x_bld)
        conv = ops.causal_conv1d(
            xBC_blc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=None if state is None else state["conv"],
            seq_idx=seq_idx_bl,
            return_final_states=state is not None,
        )
        xBC_blc, conv_state = output_and_state(conv)
        x_bli, B_bl, C_bl = xBC_blc.split([self.d_inner, self.d_groups, self.d_groups], dim=-1)
        groups = (batch, length, self.n_groups, self.config.d_state)
        ssd = ops.ssd(
            x_bli.view(batch, length, self.n_heads, self.config.headdim),
            dt_blh,
            -torch.exp(self.A_log),
            B_bl.view(groups),
            C_bl.view(groups),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=None if state is None else state["ssm"],
            seq_idx=seq_idx_bl,
            return_final_states=state is not None,
            chunk_size=self.config.chunk_size,
        )
        y_blhp, ssm_state = output_and_state(ssd)
        y_bli = self.norm(y_blhp.reshape(batch, length, self.d_inner), z_bli)
        out_bld = self.out_proj(y_bli)
        if state is None or conv_state is None or ssm_state is None:
            return out_bld, None
        return out_bld, state.replace(conv=conv_state.to(state["conv"].dtype), ssm=ssm_state)

    def forward_divided(
        self,
        x_bld: Tensor,
        tensor: TensorGroup,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        if state is None and not tensor.over_sequence and torch.is_grad_enabled():
            x_bld = x_bld.to(compute_dtype(x_bld.device, x_bld.dtype))
            # A bias would be added before the sum, which the node makes piece by piece.
            if self.out_proj.bias is None and self._fuses(x_bld):
                note_taken("mamba2", "one node of kernels, with its sums over processes")
                return self._forward_fused(x_bld, seq_idx_bl, context, tensor), None
        return super().forward_divided(x_bld, tensor, state, seq_idx_bl=seq_idx_bl, context=context)

    def _fuses(self, x_bld: Tensor) -> bool:
        """Return whether the whole mixer can run as one autograd node of kernels."""
        if torch.compiler.is_compiling() or not x_bld.is_cuda:
            return False
        return unsupported(x_bld, self.conv1d.weight.squeeze(1), self._sizes()) is None

    def _sizes(self) -> Sizes:
        return Sizes(
            heads=self.n_heads,
            head_dim=self.config.headdim,
            groups=self.n_groups,
            state=self.config.d_state,
            norm_group=self.norm.run,
            eps=self.norm.eps,
            dt_limit=self.dt_limit,
        )

    def _forward_fused(
        self,
        x_bld: Tensor,
        seq_idx_bl: Tensor | None,
        context: Passage | None = None,
        tensor: TensorGroup | None = None,
    ) -> Tensor:
        summed_by = None if tensor is None else tensor.group
        divided = Divided(self.norm.shared, summed_by, context)
        return fused_mamba2(
            x_bld, self.in_proj.weight, self.in_proj.bias,
            self.conv1d.weight.squeeze(1), self.conv1d.bias,
            self.A_log, self.D, self.dt_bias, self.norm.weight,
            self.out_proj.weight, self.out_proj.bias,
            sizes=self._sizes(), seq_idx_bl=seq_idx_bl, divided=divided,
            keep_outputs=self.keep_outputs,
        )  # fmt: skip

    def _forward_stretch(
        self, x_bld: Tensor, seq_idx_bl: Tensor | None, context: Passage
    ) -> Tensor:
        """Run this process's stretch of longer sequences; see ``mamba2lm.distributed.context``."""
        batch, length, _ = x_bld.shape
        z_bli, xBC_blc, dt_blh = self._project(x_bld)
        xBC_blc = ops.causal_conv1d(
            xBC_blc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=context.inputs_before(xBC_blc, self.config.d_conv - 1),
            seq_idx=seq_idx_bl,
        )
        x_bli, B_bl, C_bl = xBC_blc.split([self.d_inner, self.d_groups, self.d_groups], dim=-1)
        B_blgn, C_blgn = (
            x.unflatten(2, (self.n_groups, self.config.d_state)) for x in (B_bl, C_bl)
        )
        A_h = -torch.exp(self.A_log)
        y_blhp, left_bhpn = ops.ssd(
            x_bli.view(batch, length, self.n_heads, self.config.headdim),
            dt_blh,
            A_h,
            B_blgn,
            C_blgn,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            seq_idx=seq_idx_bl,
            return_final_states=True,
            chunk_size=self.config.chunk_size,
        )
        delta_blh = step_sizes(
            dt_blh, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit
        )
        log_a_bhl = (delta_blh.to(left_bhpn.dtype) * A_h).transpose(1, 2)
        log_decay_bhl = running_sum(log_a_bhl)
        entering_bhpn = context.entering_state(left_bhpn, log_decay_bhl[..., -1])
        y_blhp = ops.add_carried_outputs(
            y_blhp, log_decay_bhl, C_blgn, entering_bhpn, seq_idx=seq_idx_bl
        )
        return self.out_proj(self.norm(y_blhp.reshape(batch, length, self.d_inner), z_bli))

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
        """Run one token: three kernels on a GPU for few rows."""
        config = self.config
        zxBCdt = ops.linear_step(
            x_bd,
            self.in_proj.weight,
            self.in_proj.bias,
            norm=None if norm is None else ops.Norm(norm.weight, norm.eps),
            convolution=ops.Convolution(
                state["conv"], self.conv1d.weight.squeeze(1), self.conv1d.bias, start=self.d_inner
            ),
        )
        sizes = [self.d_inner, self.d_inner, self.d_groups, self.d_groups, self.n_heads]
        # Behind it may be padding, under tensor parallelism.
        z_bi, x_bi, B_bn, C_bn, dt_bh = zxBCdt[..., : sum(sizes)].split(sizes, dim=-1)
        inputs = (
            state["ssm"],
            x_bi.unflatten(1, (self.n_heads, config.headdim)),
            dt_bh,
            self.A_log,
            B_bn.unflatten(1, (self.n_groups, config.d_state)),
            C_bn.unflatten(1, (self.n_groups, config.d_state)),
        )
        options: dict[str, Any] = {
            "D": self.D,
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
            "A_is_log": True,
            "early": True,  # a projection comes before
        }
        before: dict[str, Any] = {}
        if not self.norm.shared and ops.takes_scale(x_bi, self.out_proj.weight):
            z_bhp = z_bi.unflatten(1, (self.n_heads, config.headdim))
            y_bhp, squares_bs = ops.ssd_state_update_normed(
                *inputs, z=z_bhp, norm=self.norm.weight, **options
            )
            y_bi = y_bhp.flatten(1)
            before["scale"] = ops.Scale(squares_bs, self.norm.eps, self.norm.group_size)
        else:
            y_bhp, _ = ops.ssd_state_update(*inputs, in_place=True, **options)
            y_bi = y_bhp.flatten(1)
            if self.norm.shared:
                y_bi = self.norm(y_bi, z_bi)
            else:
                before["norm"] = ops.Norm(self.norm.weight, self.norm.eps, self.norm.group_size)
                before["gate"] = z_bi
        return ops.linear_step(
            y_bi,
            self.out_proj.weight,
            self.out_proj.bias,
            residual=residual_bd,
            in_place=True,
            **before,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z (…, i), x|B|C (…, c) and Δ before bias and softplus (…, h)."""
        zxBCdt = self.in_proj(x)
        ends = self.d_inner, self.d_inner + self.d_conv_in
        z, xBC, dt = zxBCdt.tensor_split(ends, dim=-1)
        return z, xBC, dt[..., : self.n_heads]  # behind it may be padding, under tensor parallelism

    def new_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        weight, config = self.out_proj.weight, self.config
        device = device or weight.device
        shape = (batch, self.n_heads, config.headdim, config.d_state)
        return State(
            conv=torch.zeros(
                batch, config.d_conv - 1, self.d_conv_in, dtype=dtype or weight.dtype, device=device
            ),
            ssm=torch.zeros(shape, dtype=recurrent_dtype(weight.dtype), device=device),
        )

    def residual_weight(self) -> Tensor:
        return self.out_proj.weight

    def flops_per_token(self, length: int) -> float:
        config = self.config
        projections = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        convolution = 2 * config.d_conv * self.d_conv_in
        ssd = ssd_flops(
            batch=1,
            length=length,
            n_heads=self.n_heads,
            head_dim=config.headdim,
            n_groups=config.ngroups,
            d_state=config.d_state,
            chunk_size=config.chunk_size,
        )
        return projections + convolution + ssd / length

    def kept_bytes_per_token(self, itemsize: int) -> int:
        return (self.d_conv_in + self.d_inner) * itemsize

    def tensor_plan(self) -> Plan:
        z = x = Segment(self.n_heads, self.config.headdim)
        B = C = Segment(self.n_groups, self.config.d_state, shared_by=self.n_heads)
        heads = dt = Segment(self.n_heads)
        plan = {
            "in_proj.weight": Split((z, x, B, C, dt), pad_rows=8),
            "conv1d.weight": Split((x, B, C)),
            "A_log": Split((heads,)),
            "D": Split((heads,)),
            "dt_bias": Split((heads,)),
            "norm.weight": Split((x,)),
            "out_proj.weight": Split((x,), dim=1),
        }
        if self.config.conv_bias:
            plan["conv1d.bias"] = plan["conv1d.weight"]
        if self.config.bias:
            plan["in_proj.bias"] = plan["in_proj.weight"]
            plan["out_proj.bias"] = Split((Segment(self.d_model),), once=True)
        return plan

    def take_part(self, tensor: TensorGroup) -> None:
        groups = Segment(self.n_groups, shared_by=self.n_heads)
        mine = groups.units_of(tensor.rank, tensor.size)
        if not groups.divides(tensor.size):
            self.norm.share_groups(tensor, mine, self.n_groups)
        self.tensor = tensor
        self.n_heads //= tensor.size
        self.d_inner //= tensor.size
        self.n_groups = len(mine)
        self.d_groups = self.n_groups * self.config.d_state
        self.d_conv_in = self.d_inner + 2 * self.d_groups
