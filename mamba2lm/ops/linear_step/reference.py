"""A linear map of one token a row with what surrounds it, from the operators for its parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops.causal_conv1d.op import causal_conv1d_update
from mamba2lm.ops.dispatch import Impl
from mamba2lm.ops.gated_rms_norm.op import gated_rms_norm, rms_norm
from mamba2lm.ops.kernels import needs_gradients, no_kernels
from mamba2lm.ops.linear_step.launch import MOST_INPUTS, normalised


class Norm(NamedTuple):
    """An RMSNorm of the inputs."""

    weight: Tensor
    """(k,)."""
    eps: float = 1e-5
    group_size: int | None = None
    """Inputs normalised together; None for all."""


class Scale(NamedTuple):
    """What is left of an RMSNorm of inputs that its weight has been multiplied into."""

    squares: Tensor
    """Sums of the squares of equal parts of the inputs, before the weight, in order: (b, s) float32
    with s a multiple of the groups."""
    eps: float = 1e-5
    group_size: int | None = None
    """Inputs normalised together; None for all."""

    def of(self, width: int) -> Tensor:
        """Return the factors of the groups of ``width`` inputs, (b, groups)."""
        size = self.group_size or width
        sums_bg = self.squares.unflatten(1, (width // size, -1)).sum(dim=-1)
        return torch.rsqrt(sums_bg / size + self.eps)


class Convolution(NamedTuple):
    """A causal convolution and SiLU of some of the outputs."""

    state: Tensor
    """The w-1 outputs before, oldest first, (b, w-1, c); a step overwrites it with the next."""
    weight: Tensor
    """Taps, oldest first, (c, w)."""
    bias: Tensor | None = None
    """(c,)."""
    start: int = 0
    """The first output that is convolved; c of them are."""


def linear_step_composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gate: Tensor | None,
    convolution: Convolution | None,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
    impl: Impl,
    scale: Scale | None = None,
    in_place: bool = False,
) -> Tensor:
    """Do the parts one by one, each operator with ``impl``; arguments as ``linear_step``."""
    if scale is not None:
        factor_bg = scale.of(x.shape[1])
        x = (x.unflatten(1, (factor_bg.shape[1], -1)) * factor_bg[:, :, None]).flatten(1)
        x = x.to(weight.dtype)
    if norm is not None and impl == "auto" and _takes_step_norm(x, weight, norm, gate):
        x = normalised(x, norm, gate, weight.dtype)
    elif norm is not None and gate is not None:
        x = gated_rms_norm(
            x, gate, norm.weight, eps=norm.eps, group_size=norm.group_size, impl=impl
        )
    elif norm is not None:
        x = rms_norm(x, norm.weight, eps=norm.eps, out_dtype=norm.weight.dtype, impl=impl)
    plain = convolution is None and bias is None
    if plain and impl == "auto" and _accumulates(x, weight, residual):
        # The library's product adds to the stream, or leaves float32, in its own kernel.
        if residual is not None:
            dtype = residual.dtype
            if in_place:
                return torch.addmm(residual, x, weight.t(), out_dtype=dtype, out=residual)
            return torch.addmm(residual, x, weight.t(), out_dtype=dtype)
        if out_dtype == torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = F.linear(x, weight, bias)
    if convolution is not None:
        start, stop = convolution.start, convolution.start + convolution.weight.shape[0]
        causal_conv1d_update(
            y[:, start:stop],
            convolution.state,
            convolution.weight,
            convolution.bias,
            activation="silu",
            in_place=True,
            out=y[:, start:stop],
            impl=impl,
        )
    if residual is not None:
        return residual + y
    return y if out_dtype is None else y.to(out_dtype)


def _takes_step_norm(x: Tensor, weight: Tensor, norm: Norm, gate: Tensor | None) -> bool:
    """Return whether the small kernel for a step's norm takes these."""
    return (
        x.is_cuda
        and no_kernels(x) is None
        and no_kernels(weight) is None
        and needs_gradients(x, weight, norm.weight, gate) is None
        and x.stride(1) == 1
        and (gate is None or gate.stride(1) == 1)
        and (norm.group_size or x.shape[1]) <= MOST_INPUTS
    )


def _accumulates(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Return whether a product of these may have float32 results beside narrower inputs."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and (residual is None or residual.dtype == torch.float32)
        and needs_gradients(x, weight, residual) is None
    )
