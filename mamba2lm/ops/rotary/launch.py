"""Launch the rotation's Triton kernel over a fused projection, with its gradient.

Triton itself is imported on the first launch, so that this module imports everywhere.

Letters: b batch, l length, h query heads, k key-value heads, p head dim, r rotated pairs,
c channels of the projection (q, k and v side by side).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.kernels import Launches, on_device, signature, unit_stride

ALIGNED = 8
"""Elements by which strides are divided where all of them can be; see ``kernels.py``."""

ROWS, HEADS, WARPS = 16, 4, 4
"""Positions and heads of a program, and its warps."""


@lru_cache
def _kernel() -> Any:
    """Import the kernel, and Triton with it."""
    return importlib.import_module("mamba2lm.ops.rotary.kernels").rotary_kernel


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def rotate(
    x_blhp: Tensor, cos_blr: Tensor, sin_blr: Tensor, y_blhp: Tensor, *, back: bool = False
) -> None:
    """Write x, rotated, to y.

    Args:
        x_blhp: Queries, keys or a gradient.
        cos_blr: (b or 1, l, r), float32, contiguous.
        sin_blr: The same.
        y_blhp: Where to write, unit stride along p.
        back: Rotate by minus the angles.
    """
    b, length, h, p = x_blhp.shape
    pairs = cos_blr.shape[-1]
    x_blhp = unit_stride(x_blhp)
    assert y_blhp.stride(3) == 1
    assert cos_blr.is_contiguous()
    assert sin_blr.is_contiguous()
    strides = (*x_blhp.stride()[:3], *y_blhp.stride()[:3])
    unit = ALIGNED if all(stride % ALIGNED == 0 for stride in strides) else 1
    angle_b = 0 if cos_blr.shape[0] == 1 else cos_blr.stride(0)
    key = (signature(x_blhp), signature(y_blhp), pairs, back, unit)
    launch = Launches(x_blhp.device, "rotary", *key)
    with on_device(x_blhp.device):
        launch(
            _kernel(), (-(-h // HEADS), -(-length // ROWS), b),
            x_blhp, y_blhp, cos_blr, sin_blr, *(stride // unit for stride in strides),
            angle_b, cos_blr.stride(1), length, h,
            warps=WARPS, BACK=back, PAIRS=pairs, PAIR_BLOCK=_power_of_two(pairs),
            REST=p - 2 * pairs, REST_BLOCK=_power_of_two(p - 2 * pairs),
            ROWS=ROWS, HEADS=HEADS, UNIT=unit,
        )  # fmt: skip


def forward(
    qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
) -> tuple[Tensor, Tensor]:
    """Return queries (b, l, h, p) and keys (b, l, k, p) of a projection, rotated."""
    q_blhp, k_blkp, _ = _heads(qkv_blc, h, k)
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_blhp, k_blkp)]
    for x, y in zip((q_blhp, k_blkp), turned, strict=True):
        rotate(x, cos_blr, sin_blr, y)
    return turned[0], turned[1]


def backward(
    dq_blhp: Tensor | None,
    dk_blkp: Tensor | None,
    dv_blkp: Tensor | None,
    cos_blr: Tensor,
    sin_blr: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    h: int,
    k: int,
) -> Tensor:
    """Return the gradient of a projection of this shape (b, l, c), contiguous.

    Args:
        dq_blhp: Gradient of the rotated queries; None is zero, here and below.
        dk_blkp: Of the rotated keys.
        dv_blkp: Of the values.
        cos_blr: As the forward pass had them.
        sin_blr: The same.
        shape: Of the projection.
        dtype: Of the projection.
        h: Query heads.
        k: Key-value heads.
    """
    dqkv_blc = torch.empty(shape, dtype=dtype, device=cos_blr.device)
    dq_out, dk_out, dv_out = _heads(dqkv_blc, h, k)
    for gradient, out in ((dq_blhp, dq_out), (dk_blkp, dk_out)):
        if gradient is None:
            out.zero_()
        else:
            rotate(gradient, cos_blr, sin_blr, out, back=True)
    if dv_blkp is None:
        dv_out.zero_()
    else:
        dv_out.copy_(dv_blkp)
    return dqkv_blc


def _heads(qkv_blc: Tensor, h: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of queries, keys and values in a projection."""
    q_blhp, k_blkp, v_blkp = qkv_blc.unflatten(-1, (h + 2 * k, -1)).split([h, k, k], dim=2)
    return q_blhp, k_blkp, v_blkp


def _forward_apart(
    qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values too, a copy: a custom operator may not return a view of what it is given."""
    v_blkp = _heads(qkv_blc, h, k)[2]
    return (
        *forward(qkv_blc, cos_blr, sin_blr, h, k),
        v_blkp.clone(memory_format=torch.contiguous_format),
    )


forward_op = torch.library.custom_op("mamba2lm::rotary_heads", _forward_apart, mutates_args=())
backward_op = torch.library.custom_op("mamba2lm::rotary_heads_backward", backward, mutates_args=())


@forward_op.register_fake
def _(
    qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, length, c = qkv_blc.shape
    p = c // (h + 2 * k)
    q_blhp, k_blkp, v_blkp = (qkv_blc.new_empty(b, length, heads, p) for heads in (h, k, k))
    return q_blhp, k_blkp, v_blkp


@backward_op.register_fake
def _(
    dq_blhp: Tensor | None,
    dk_blkp: Tensor | None,
    dv_blkp: Tensor | None,
    cos_blr: Tensor,
    sin_blr: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    h: int,
    k: int,
) -> Tensor:
    return cos_blr.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv_blc, cos_blr, sin_blr, *ctx.heads = inputs
    ctx.save_for_backward(cos_blr, sin_blr)
    ctx.shape, ctx.dtype = qkv_blc.shape, qkv_blc.dtype
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., Tensor], ctx: Any, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    dqkv_blc = run(*gradients, *ctx.saved_tensors, ctx.shape, ctx.dtype, *ctx.heads)
    return dqkv_blc, None, None, None, None


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(backward_op, ctx, gradients)


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without the custom operator's dispatch, and with values left in place."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = *forward(*inputs), _heads(inputs[0], *inputs[3:])[2]
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _gradients(backward, ctx, gradients)


def rotary_heads_triton(
    qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a projection into heads and rotate with the kernel; see ``rotary_heads``.

    Differentiable once in ``qkv_blc``.
    """
    angles = (angle.to(torch.float32).contiguous() for angle in (cos_blr, sin_blr))
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(qkv_blc, *angles, h, k)
