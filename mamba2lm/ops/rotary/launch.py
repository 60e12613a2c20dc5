"""Launch the rotation's Triton kernel, as an autograd function over a fused projection.

Triton itself is imported on the first launch, so that this module imports everywhere.

Letters: b batch, l length, h query heads, k key-value heads, p head dim, r rotated pairs,
c channels of the projection (q, k and v side by side).
"""

from __future__ import annotations

import importlib
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


class _RotaryHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads_blhp = qkv_blc.unflatten(-1, (h + 2 * k, -1))
        q, key, v = heads_blhp.split([h, k, k], dim=2)
        turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, key)]
        for x, y in zip((q, key), turned, strict=True):
            rotate(x, cos_blr, sin_blr, y)
        ctx.save_for_backward(cos_blr, sin_blr)
        ctx.shape, ctx.dtype, ctx.heads = heads_blhp.shape, qkv_blc.dtype, (h, k)
        ctx.set_materialize_grads(False)
        return turned[0], turned[1], v

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        cos_blr, sin_blr = ctx.saved_tensors
        h, k = ctx.heads
        dqkv_blhp = torch.empty(ctx.shape, dtype=ctx.dtype, device=cos_blr.device)
        parts = dqkv_blhp.split([h, k, k], dim=2)
        for gradient, part in zip((dq, dk, dv), parts, strict=True):
            if gradient is None:
                part.zero_()
            elif part is parts[2]:
                part.copy_(gradient)
            else:
                rotate(gradient, cos_blr, sin_blr, part, back=True)
        return dqkv_blhp.flatten(2), None, None, None, None


def rotary_heads_triton(
    qkv_blc: Tensor, cos_blr: Tensor, sin_blr: Tensor, h: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a projection into heads and rotate with the kernel; see ``rotary_heads``.

    Differentiable once in ``qkv_blc``.
    """
    angles = (angle.to(torch.float32).contiguous() for angle in (cos_blr, sin_blr))
    return _RotaryHeads.apply(qkv_blc, *angles, h, k)
