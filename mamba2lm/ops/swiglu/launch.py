"""Launch the gate's Triton kernels, as PyTorch custom operators with gradients.

Triton itself is imported on the first launch, so that this module imports everywhere.

Letters: t rows (all leading axes), f hidden width.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.kernels import Launches, on_device, signature

ALIGNED = 8
"""Elements by which strides are divided where all of them can be; see ``kernels.py``."""

BLOCK, ROWS, WARPS = 256, 16, 4
"""Channels and rows of a program, and its warps."""


@lru_cache
def _kernels() -> Any:
    """Import the kernels, and Triton with them."""
    return importlib.import_module("mamba2lm.ops.swiglu.kernels")


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x = [gate, up] (…, 2f), contiguous, in the dtype of x."""
    x_tc = _rows(x)
    t, f = x_tc.shape[0], x_tc.shape[1] // 2
    y = torch.empty(*x.shape[:-1], f, dtype=x.dtype, device=x.device)
    unit = ALIGNED if (x_tc.stride(0) | f) % ALIGNED == 0 else 1
    launch = Launches(x.device, "swiglu", unit, signature(x))
    with on_device(x.device):
        launch(
            _kernels().swiglu_kernel, (-(-f // BLOCK), -(-t // ROWS), 1),
            x_tc, y, x_tc.stride(0) // unit, t, f // unit,
            warps=WARPS, ROWS=ROWS, BLOCK=BLOCK, UNIT=unit,
        )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x (…, 2f), contiguous, from that of y (…, f)."""
    x_tc, dy_tf = _rows(x), _rows(dy)
    t, f = dy_tf.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = ALIGNED if (x_tc.stride(0) | dy_tf.stride(0) | f) % ALIGNED == 0 else 1
    launch = Launches(x.device, "swiglu backward", unit, signature(dy), signature(x))
    with on_device(x.device):
        launch(
            _kernels().swiglu_backward_kernel, (-(-f // BLOCK), -(-t // ROWS), 1),
            dy_tf, x_tc, dx, dy_tf.stride(0) // unit, x_tc.stride(0) // unit, t, f // unit,
            warps=WARPS, ROWS=ROWS, BLOCK=BLOCK, UNIT=unit,
        )  # fmt: skip
    return dx


forward_op = torch.library.custom_op("mamba2lm::swiglu_forward", forward, mutates_args=())
backward_op = torch.library.custom_op("mamba2lm::swiglu_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@backward_op.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return backward_op(dy, *ctx.saved_tensors)


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without the custom operator's dispatch, which eager code need not pay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return backward(dy, *ctx.saved_tensors)


def swiglu_triton(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x = [gate, up] (…, 2f) with the kernels; differentiable once."""
    return forward_op(x) if torch.compiler.is_compiling() else _Eager.apply(x)
