"""Launch the selective scan's Triton kernels, as PyTorch custom operators with gradients.

Triton itself is imported on the first launch, so that this module imports everywhere. How a kernel
is launched is chosen in ``config.py``.

Letters: b batch, l length, d channels, n state, s segments, c chunks, k splits.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.discretisation import limit_binds
from mamba2lm.ops.kernels import Launches, on_device, signature, unit_stride
from mamba2lm.ops.scan_operator import Gradients, ScanOperator
from mamba2lm.ops.selective_scan.config import (
    TUNED,
    Blocks,
    Config,
    channel_block,
    choose_config,
    config_for,
    override_config,
    power_of_two,
    segment_length,
    unsupported,
)

__all__ = [
    "TUNED",
    "Blocks",
    "Config",
    "backward",
    "channel_block",
    "choose_config",
    "forward",
    "override_config",
    "segment_length",
    "selective_scan_triton",
    "unsupported",
]


@lru_cache
def _kernels(module: str) -> Any:
    """Import a module of kernels, and Triton with the first."""
    return importlib.import_module(f"mamba2lm.ops.selective_scan.{module}")


def sum_precision(x: Tensor) -> str:
    """Return how matrix products that add terms up are computed, Triton's ``input_precision``.

    TF32 terms have 2⁻¹¹ of relative error, a quarter of what rounding the sum to bfloat16 makes;
    three TF32 products are as good as float32.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if x.dtype == torch.bfloat16 else "tf32x3"


def _in_pairs(tensor: Tensor) -> bool:
    """Whether two neighbouring bfloat16 states are always one aligned word."""
    even = all(size % 2 == 0 for size in (tensor.shape[-1], *tensor.stride()[:-1]))
    return tensor.dtype == torch.bfloat16 and even and tensor.data_ptr() % 4 == 0


def row_strides(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> dict[str, Any]:
    """Return the strides along the sequence, which kernels are compiled for.

    A model has few, and known distances need no address arithmetic.
    """
    return {
        "X_L": x.stride(1),
        "DT_L": dt.stride(1),
        "B_L": B.stride(1),
        "C_L": C.stride(1),
        "Z_L": 0 if z is None else z.stride(1),
    }


@dataclass(frozen=True)
class _Call:
    """What the kernels of one call share."""

    launches: Launches
    config: Config
    dt: Tensor
    A: Tensor
    dt_bias: Tensor | None
    restart: Tensor | None
    size: tuple[int, int, int, int]
    low: float
    high: float
    flags: dict[str, Any]
    packed: bool
    """Whether B and C can be read two states at a time."""

    @classmethod
    def of(
        cls,
        name: str,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        dt_bias: Tensor | None,
        restart: Tensor | None,
        dt_softplus: bool,
        low: float,
        high: float,
        B: Tensor,
        C: Tensor,
        *others: Tensor | None,
        extra: tuple[Any, ...] = (),
    ) -> _Call:
        b, length, d = x.shape
        n = A.shape[1]
        config = config_for(x, n)
        clamp = limit_binds(dt_softplus, low, high)
        packed = n == power_of_two(n) and _in_pairs(B) and _in_pairs(C)
        tensors = (x, dt, A, dt_bias, restart, B, C, *others)
        key = (name, config, dt_softplus, clamp, packed, extra, *(signature(t) for t in tensors))
        flags: dict[str, Any] = {
            "HAS_BIAS": dt_bias is not None,
            "SOFTPLUS": dt_softplus,
            "CLAMP": clamp,
            "HAS_RESTARTS": restart is not None,
        }
        return cls(
            Launches(x.device, *key), config, dt, A, dt_bias, restart, (b, length, d, n),
            low, high, flags, packed,
        )  # fmt: skip

    def states_entering(
        self,
        value: Tensor,
        key: Tensor,
        z: Tensor | None,
        initial: Tensor | None,
        segment: int,
        *,
        reverse: bool,
    ) -> Tensor:
        """Return the state that enters each segment, (b, s, d, n).

        In reverse: the gradient of the state that leaves it, from the values dy and the keys C.
        """
        kernels = _kernels("forward")
        b, length, d, n = self.size
        blocks, n_block = self.config.ends, power_of_two(n)
        d_block = channel_block(blocks, n_block)
        segments = -(-length // segment)
        ends = torch.empty(b, segments, d, n, dtype=torch.float32, device=value.device)
        span = torch.empty(b, segments, d, dtype=torch.float32, device=value.device)
        broken = torch.empty(b, segments, dtype=torch.float32, device=value.device)
        variant = "reverse" if reverse else ""
        self.launches(
            kernels.ends_kernel, (-(-d // d_block), segments - 1, b),
            value, self.dt, self.A, key, value if z is None else z,
            self.A if self.dt_bias is None else self.dt_bias,
            self.A if self.restart is None else self.restart, ends, span, broken,
            value.stride(0), self.dt.stride(0), key.stride(0), 0 if z is None else z.stride(0),
            length, d, n, segment, segments, 1, self.low, self.high,
            warps=blocks.warps, registers=blocks.registers, variant=variant,
            VALUE_L=value.stride(1), DT_L=self.dt.stride(1), KEY_L=key.stride(1),
            Z_L=0 if z is None else z.stride(1),
            REVERSE=reverse, HAS_Z=z is not None, **self.flags,
            EVEN_N=n == n_block, PACKED=self.packed, N=n_block, D_BLOCK=d_block,
            STEPS=blocks.steps,
        )  # fmt: skip
        strides = (0, 0, 0) if initial is None else initial.stride()
        self.launches(
            kernels.pass_kernel, (-(-d * n // 256), b, 1),
            ends, span, broken, self.A, ends if initial is None else initial, *strides,
            d, n, segments,
            warps=4, variant=variant,
            REVERSE=reverse, HAS_RESTARTS=self.restart is not None,
            HAS_ENTER=initial is not None, BLOCK=256,
        )  # fmt: skip
        return ends


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    restart: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        x: Inputs, (b, l, d).
        dt: Raw step sizes, (b, l, d).
        A: Decay rates, (d, n).
        B: Input maps, (b, l, n).
        C: Output maps, (b, l, n).
        D: Skip weights, (d,), or None.
        z: Gate, (b, l, d), or None.
        dt_bias: (d,) or None.
        initial_states: (b, d, n) or None.
        restart: uint8, (b, l), not 0 where a document begins, or None.
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        low: Smallest Δ.
        high: Largest Δ.
        save: Whether a backward pass may follow.

    Returns:
        y (b, l, d); the final states (b, d, n), float32; and for the backward pass the state before
        each chunk, (b, c, n, d), float32, or an empty tensor.
    """
    x, dt, B, C = unit_stride(x), unit_stride(dt), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    call = _Call.of(
        "selective_scan_forward", x, dt, A, dt_bias, restart, dt_softplus, low, high,
        B, C, D, z, initial_states, extra=(save,),
    )  # fmt: skip
    config, blocks = call.config, call.config.scan
    b, length, d, n = call.size
    n_block = power_of_two(n)
    d_block = channel_block(blocks, n_block)
    chunks = -(-length // config.chunk)
    segment = segment_length(blocks, config, length, b * -(-d // d_block))
    segments = -(-length // segment)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    final = torch.empty(b, d, n, dtype=torch.float32, device=x.device)
    states = torch.empty((b, chunks, n, d) if save else (0,), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        enter = initial_states
        strides = (0, 0, 0, 0)
        if enter is not None:
            strides = (enter.stride(0), 0, enter.stride(1), enter.stride(2))
        if segments > 1:
            enter = call.states_entering(x, B, None, initial_states, segment, reverse=False)
            strides = enter.stride()
        # A pointer that the kernel does not follow must still be one.
        call.launches(
            _kernels("forward").scan_kernel, (-(-d // d_block), segments, b),
            x, dt, A, B, C, A if D is None else D, x if z is None else z,
            A if dt_bias is None else dt_bias, A if restart is None else restart,
            A if enter is None else enter, y, states, final,
            x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            *strides,
            length, d, n, segment, chunks, 1, low, high,
            warps=blocks.warps, registers=blocks.registers,
            **row_strides(x, dt, B, C, z), Y_L=d,
            HAS_D=D is not None, HAS_Z=z is not None, **call.flags,
            HAS_ENTER=enter is not None, SAVE=save, EVEN_N=n == n_block,
            PACKED=call.packed, Q=config.chunk, N=n_block, D_BLOCK=d_block, STEPS=blocks.steps,
        )  # fmt: skip
    return y, final, states


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    restart: Tensor | None,
    states: Tensor,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Gradients:
    """Run the backward kernels.

    Args:
        dy: Gradient of y, (b, l, d).
        dfinal: Gradient of the final states, (b, d, n), or None for zero.
        states: The states before each chunk, as ``forward`` returned them.

    Other Args: as ``forward``.

    Returns:
        Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states; those of absent arguments are
        empty tensors.
    """
    kernels = _kernels("backward")
    x, dt, B, C, dy = (
        unit_stride(x),
        unit_stride(dt),
        unit_stride(B),
        unit_stride(C),
        unit_stride(dy),
    )
    z = None if z is None else unit_stride(z)
    call = _Call.of(
        "selective_scan_backward", x, dt, A, dt_bias, restart, dt_softplus, low, high,
        B, C, D, z, initial_states, dy, dfinal,
    )  # fmt: skip
    config, blocks = call.config, call.config.gradients
    b, length, d, n = call.size
    # A matrix product has at least 16 columns.
    n_block = max(16, power_of_two(n)) if config.dot else power_of_two(n)
    d_block = channel_block(blocks, n_block)
    chunks = -(-length // config.chunk)
    segment = segment_length(blocks, config, length, b * -(-d // d_block))
    segments = -(-length // segment)
    # As few splits as leave enough programs.
    d_blocks = -(-d // d_block)
    each = max(1, min(config.blocks, b * segments * d_blocks // blocks.programs))
    splits = -(-d_blocks // each)
    wide = {"dtype": torch.float32, "device": x.device}
    per_program = config.chunk // blocks.steps * d_block * n_block
    scratch = torch.empty(b * segments * splits * per_program, **wide)
    dx, ddt = (torch.empty(b, length, d, dtype=t.dtype, device=x.device) for t in (x, dt))
    dz = torch.empty((0,) if z is None else (b, length, d), dtype=x.dtype, device=x.device)
    sums = torch.empty(2, splits, b, length, n, **wide)
    dA_sums = torch.empty(b * segments, d, n, **wide)
    row_sums = torch.empty(2, b * segments, d, **wide)
    dinitial = torch.empty((0,) if initial_states is None else (b, d, n), **wide)
    dB = torch.empty(b, length, n, dtype=B.dtype, device=x.device)
    dC = torch.empty_like(dB)
    dA = torch.empty_like(A)
    dD = A.new_empty(0) if D is None else torch.empty_like(D)
    dbias = A.new_empty(0) if dt_bias is None else torch.empty_like(dt_bias)
    with on_device(x.device):
        leave = None if dfinal is None else dfinal.contiguous()
        if segments > 1:
            leave = call.states_entering(dy, C, z, leave, segment, reverse=True)
        call.launches(
            kernels.gradients_kernel, (splits, segments, b),
            x, dt, A, B, C, A if D is None else D, x if z is None else z,
            A if dt_bias is None else dt_bias, A if restart is None else restart, dy,
            states, A if leave is None else leave, scratch,
            dx, ddt, dz, sums[0], sums[1], dA_sums, row_sums[0], row_sums[1], dinitial,
            x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            dy.stride(0), length, segment, segments, chunks, each, b, low, high, 1.0, 1,
            warps=blocks.warps, registers=blocks.registers,
            **row_strides(x, dt, B, C, z), DY_L=dy.stride(1), CHANNELS=d, STATES=n,
            HAS_D=D is not None, HAS_Z=z is not None, **call.flags,
            HAS_LEAVE=leave is not None, HAS_INITIAL=initial_states is not None,
            EVEN=length % blocks.steps == 0, EVEN_N=n == n_block,
            PACKED=call.packed and n == n_block,
            Q=config.chunk, N=n_block, D_BLOCK=d_block, STEPS=blocks.steps, KEEP=config.keep,
            SPREAD=not config.dot, DOT=config.dot, PRECISION=sum_precision(x),
            WALK=config.walk, EVEN_WALK=length % config.walk == 0,
        )  # fmt: skip
        _reduce(call, "keys", sums, splits, dB, dC)
        _reduce(call, "A", dA_sums, b * segments, dA)
        if D is not None:
            _reduce(call, "D", row_sums, b * segments, dD, None if dt_bias is None else dbias)
        elif dt_bias is not None:
            _reduce(call, "bias", row_sums[1], b * segments, dbias)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _reduce(
    call: _Call,
    name: str,
    partial: Tensor,
    splits: int,
    first: Tensor,
    second: Tensor | None = None,
) -> None:
    """Sum partial sums (1 or 2, splits, …) over the splits into one or two tensors."""
    block = 64
    call.launches(
        _kernels("backward").reduce_kernel,
        (-(-first.numel() // block), 1 if second is None else 2, 1),
        partial, first, first if second is None else second, first.numel(), splits,
        warps=4, variant=name,
        SECOND=second is not None, BLOCK=block, SPLIT_BLOCK=32,
    )  # fmt: skip


def _fake_forward(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, length, d = x.shape
    n = A.shape[1]
    chunks = -(-length // config_for(x, n).chunk)
    save = others[-1]
    final = x.new_empty(b, d, n, dtype=torch.float32)
    states = x.new_empty((b, chunks, n, d) if save else (0,), dtype=torch.float32)
    return x.new_empty(b, length, d), final, states


_operator = ScanOperator("selective_scan", forward, _fake_forward, backward)
forward_op, backward_op = _operator.forward_op, _operator.backward_op


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    restart: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan with the Triton kernels; differentiable once in every tensor.

    Args:
        x: Inputs, (b, l, d), any strides; bfloat16, float16 or float32.
        dt: Raw step sizes, (b, l, d).
        A: Decay rates, (d, n), n ≤ 256.
        B: Input maps, (b, l, n).
        C: Output maps, (b, l, n).
        D: Skip weights, (d,), or None.
        z: Gate, (b, l, d), or None.
        dt_bias: Bias of the step sizes, (d,), or None.
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Smallest and largest Δ.
        initial_states: State before position 0, (b, d, n), or None.
        restart: Whether a document begins at a position and the state from zero, (b, l), bool; or
            None.

    Returns:
        y (b, l, d) in the dtype of x and the final states (b, d, n) in float32.

    Source: Gu & Dao 2023 (arXiv:2312.00752), algorithm 2 and section 3.3.2.
    """
    tensors = (
        x,
        dt,
        A.contiguous(),
        B,
        C,
        None if D is None else D.contiguous(),
        z,
        None if dt_bias is None else dt_bias.contiguous(),
        initial_states,
        None if restart is None else restart.contiguous().view(torch.uint8),
    )
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    arguments = (*tensors, dt_softplus, float(dt_limit[0]), float(dt_limit[1]), save)
    return _operator(*arguments)
