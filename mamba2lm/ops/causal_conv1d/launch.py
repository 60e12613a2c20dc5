"""Launch the causal convolution's Triton kernels, as PyTorch custom operators with gradients.

Triton itself is imported on the first launch, so that this module imports everywhere. ``forward``
and ``backward`` are plain functions that a layer with a gradient of its own may call.

Letters: b batch, l length, d channels, w conv width; the state is the last w-1 inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.kernels import (
    INTERPRETED,
    Launches,
    no_kernels,
    on_device,
    signature,
    unit_stride,
)

WIDEST = 4
"""Taps that the kernels keep in registers at most."""

ALIGNED = 8
"""Elements by which strides are divided where all of them can be; see ``forward.py``."""


NVIDIA = torch.version.hip is None and not INTERPRETED
"""Whether kernels may use NVIDIA's instructions by name."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel is launched; changes speed, never the result of the forward pass."""

    channels: int
    """Channels per program, a power of two."""
    warps: int
    ahead: int
    """Rows loaded before the first of them is used."""
    programs: int
    """Programs there should be at most, so that they fill a GPU in few whole waves."""
    prefetch: bool = False
    """Whether the next rows are loaded before the current ones are computed: more registers."""
    registers: int | None = None
    """The most that a thread may use, on NVIDIA's GPUs; None leaves it to the compiler."""


FORWARD = Blocks(channels=256, warps=2, ahead=4, programs=4224)
BACKWARD = Blocks(channels=256, warps=2, ahead=4, programs=1056, prefetch=True, registers=128)

_override: tuple[Blocks, Blocks] | None = None


def override_blocks(forward: Blocks, backward: Blocks) -> None:
    """Use these for every call (tests and tuning)."""
    global _override
    _override = forward, backward


def tuned_blocks() -> None:
    """Undo ``override_blocks``."""
    global _override
    _override = None


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Say why the kernels cannot take these inputs, or None when they can.

    Args:
        x: Inputs, (b, l, d).
        weight: Taps, (d, w).
    """
    if (reason := no_kernels(x)) is not None:
        return reason
    if weight.shape[-1] > WIDEST:
        return f"weight has {weight.shape[-1]} taps (axis 1); the kernels take up to {WIDEST}"
    return None


@lru_cache
def _kernel(module: str, name: str) -> Any:
    """Import a kernel, and Triton with the first."""
    return getattr(importlib.import_module(f"mamba2lm.ops.{module}"), name)


def _row_count(blocks: Blocks, length: int, others: int) -> int:
    """Return the rows of a program when there are ``others`` programs for every stretch of rows."""
    stretches = max(1, blocks.programs // others)
    return -(-length // (stretches * blocks.ahead)) * blocks.ahead


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        x: Inputs, (b, l, d); read where they lie if the last axis has unit stride.
        weight: Taps, oldest first, (d, w), any float dtype.
        bias: (d,) or None.
        initial_states: (b, w-1, d) or None.
        seq_idx: Document ids, (b, l), or None.
        silu: Whether SiLU follows.
        return_final_states: Whether to fill the second result.

    Returns:
        y (b, l, d), contiguous, in the dtype of x; the final states (b, w-1, d) in the dtype of x,
        or an empty tensor.
    """
    b, length, d = x.shape
    w = weight.shape[1]
    x = unit_stride(x)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    final = torch.empty(
        (b, w - 1, d) if return_final_states else (0,), dtype=x.dtype, device=x.device
    )
    blocks = FORWARD if _override is None else _override[0]
    channel_blocks = -(-d // blocks.channels)
    rows = _row_count(blocks, length, b * channel_blocks)
    row_blocks = -(-length // rows)
    x_b, x_l, _ = x.stride()
    unit = ALIGNED if (x_b | x_l | d) % ALIGNED == 0 else 1
    # A pointer that the kernel does not follow must still be one.
    ids = x if seq_idx is None else seq_idx
    initial = x if initial_states is None else initial_states.contiguous()
    key = (signature(t) for t in (x, weight, bias, initial_states, seq_idx))
    launch = Launches(x.device, "convolve", blocks, silu, return_final_states, *key)
    with on_device(x.device):
        launch(
            _kernel("causal_conv1d.forward", "convolve_kernel"),
            (b * row_blocks * channel_blocks, 1, 1),
            x, weight.contiguous(), x if bias is None else bias, initial, ids, y, final,
            x_b // unit, x_l // unit, ids.stride(0), ids.stride(1),
            length, d // unit, row_blocks, channel_blocks, rows,
            warps=blocks.warps, registers=blocks.registers if NVIDIA else None,
            HAS_BIAS=bias is not None, HAS_INITIAL=w > 1 and initial_states is not None,
            HAS_IDS=w > 1 and seq_idx is not None, WANT_FINAL=w > 1 and return_final_states,
            SILU=silu, W=w, AHEAD=blocks.ahead, PREFETCH=blocks.prefetch, NVIDIA=NVIDIA,
            BLOCK=blocks.channels, UNIT=unit,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    dx_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        dy: Gradient of y, (b, l, d).
        dfinal: Gradient of the final states, (b, w-1, d), or None for zero.
        dx_out: Where to write the gradient of x, (b, l, d) with unit stride on the last axis: a
            slice of the gradient of a fused projection, for one. None allocates it.

    Other Args: as ``forward``.

    Returns:
        Gradients of x, weight, bias and initial_states; those of absent arguments are empty.
    """
    b, length, d = x.shape
    w = weight.shape[1]
    x, dy = unit_stride(x), unit_stride(dy)
    device = x.device
    dx = torch.empty(b, length, d, dtype=x.dtype, device=device) if dx_out is None else dx_out
    assert dx.shape == x.shape
    assert dx.stride(2) == 1
    given = initial_states is not None
    dinitial = torch.empty(
        initial_states.shape if given else (0,),
        dtype=initial_states.dtype if given else torch.float32, device=device,
    )  # fmt: skip
    blocks = BACKWARD if _override is None else _override[1]
    channel_blocks = -(-d // blocks.channels)
    rows = _row_count(blocks, length, b * channel_blocks)
    row_blocks = -(-length // rows)
    partial = torch.empty(
        b * row_blocks, w if bias is None else w + 1, d, dtype=torch.float32, device=device
    )
    strides = (*dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2])
    unit = ALIGNED if all(size % ALIGNED == 0 for size in (*strides, d)) else 1
    ids = x if seq_idx is None else seq_idx
    initial = x if initial_states is None else initial_states.contiguous()
    dweight = torch.empty(d, w, dtype=weight.dtype, device=device)
    dbias = torch.empty(0, device=device) if bias is None else torch.empty_like(bias)
    key = (signature(t) for t in (dy, dfinal, x, weight, bias, initial_states, seq_idx, dx))
    launch = Launches(device, "convolve backward", blocks, silu, *key)
    with on_device(device):
        launch(
            _kernel("causal_conv1d.backward", "convolve_backward_kernel"),
            (b * row_blocks * channel_blocks, 1, 1),
            dy, x if dfinal is None else dfinal.contiguous(), x, weight.contiguous(),
            x if bias is None else bias, initial, ids, dx, dinitial, partial,
            *(stride // unit for stride in strides), ids.stride(0), ids.stride(1),
            length, d // unit, row_blocks, channel_blocks, rows,
            warps=blocks.warps, registers=blocks.registers if NVIDIA else None,
            HAS_BIAS=bias is not None, HAS_INITIAL=w > 1 and initial_states is not None,
            HAS_DFINAL=w > 1 and dfinal is not None, HAS_IDS=w > 1 and seq_idx is not None,
            SILU=silu, W=w, AHEAD=blocks.ahead, PREFETCH=blocks.prefetch, NVIDIA=NVIDIA,
            BLOCK=blocks.channels, UNIT=unit,
        )  # fmt: skip
        _kernel("partial_sums", "add_partial_sums")(
            launch, partial, dweight, None if bias is None else dbias
        )
    return dx, dweight, dbias, dinitial


def _backward_anew(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels into new tensors, the form that a custom operator may have."""
    return backward(dy, dfinal, x, weight, bias, initial_states, seq_idx, silu)


forward_op = torch.library.custom_op("mamba2lm::causal_conv1d_forward", forward, mutates_args=())
backward_op = torch.library.custom_op(
    "mamba2lm::causal_conv1d_backward", _backward_anew, mutates_args=()
)


@forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    b, _, d = x.shape
    final_shape = (b, weight.shape[1] - 1, d) if return_final_states else (0,)
    return x.new_empty(x.shape), x.new_empty(final_shape)


@backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        none if bias is None else torch.empty_like(bias),
        none.clone() if initial_states is None else initial_states.new_empty(initial_states.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, silu, return_final_states = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu, ctx.has_final = silu, return_final_states
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_states, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if not ctx.has_final:
        dfinal = None  # compiled code sends a gradient of the empty result too
    dx, dweight, dbias, dinitial = run(
        dy, dfinal, x, weight, bias, initial_states, seq_idx, ctx.silu
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_states is None else dinitial,
        None,
        None,
        None,
    )


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(backward_op, ctx, dy, dfinal)


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without the custom operator's dispatch, which eager code need not pay."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _gradients(backward, ctx, dy, dfinal)


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve with the Triton kernels; differentiable once in every floating-point argument.

    Args:
        x: Inputs, (b, l, d); bfloat16, float16 or float32.
        weight: Taps, oldest first, (d, w), w ≤ 4; used in float32 whatever their dtype.
        bias: (d,) or None.
        silu: Whether SiLU follows.
        initial_states: The w-1 inputs before position 0, (b, w-1, d), or None for zeros.
        seq_idx: Document ids, (b, l), or None.
        return_final_states: Whether to fill the second result.

    Returns:
        y (b, l, d) and the final states (b, w-1, d), both in the dtype of x; the latter is empty
        unless asked for.
    """
    arguments = (x, weight, bias, initial_states, seq_idx, silu, return_final_states)
    return (forward_op if torch.compiler.is_compiling() else _Eager.apply)(*arguments)
