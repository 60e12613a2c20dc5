"""Launch the kernel of the one-token update. Triton is imported on the first launch.

Letters: b batch, d channels, w conv width.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.causal_conv1d.launch import WIDEST
from mamba2lm.ops.kernels import (
    Launches,
    chains,
    needs_gradients,
    no_kernels,
    on_device,
    signature,
    unit_stride,
)

CHANNELS = 256
"""Per program."""


def step_unsupported(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Say why the kernel cannot take these inputs, or None when it can."""
    if (reason := no_kernels(x) or no_kernels(state)) is not None:
        return reason
    if weight.shape[-1] > WIDEST:
        return f"weight has {weight.shape[-1]} taps (axis 1); the kernel takes up to {WIDEST}"
    return needs_gradients(x, state, weight, bias)


@lru_cache
def _kernel() -> Any:
    return importlib.import_module("mamba2lm.ops.causal_conv1d.step").convolve_step_kernel


def convolve_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    in_place: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as ``causal_conv1d_update``."""
    b, d = x.shape
    w = weight.shape[1]
    x, weight = unit_stride(x), weight.contiguous()
    old = state if b and state[0].is_contiguous() else state.contiguous()
    if in_place:
        assert old is state or not b, "a state updated in place must be contiguous in each row"
    new = state if in_place else torch.empty_like(old)
    y = torch.empty(b, d, dtype=x.dtype, device=x.device) if out is None else out
    assert y.stride(1) == 1
    if x.numel() == 0:
        return y, new
    chain = chains(x.device)
    key = (signature(t) for t in (x, old, weight, bias, out))
    launch = Launches(x.device, "convolve step", silu, in_place, *key)
    with on_device(x.device):
        launch(
            _kernel(), (-(-d // CHANNELS), b, 1),
            x, old, weight, x if bias is None else bias, y, new,
            x.stride(0), old.stride(0), y.stride(0), new.stride(0), d,
            warps=2, chain=chain,
            HAS_BIAS=bias is not None, SILU=silu, W=w, BLOCK=CHANNELS, CHAIN=chain,
        )  # fmt: skip
    return y, new
