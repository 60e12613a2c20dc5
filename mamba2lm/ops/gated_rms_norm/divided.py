"""The gated norm where groups of channels are divided over processes.

One number a token and group crosses them in each pass; all else is local. On a GPU the local parts
are Triton kernels, elsewhere PyTorch.

Letters: t rows (all leading axes), d channels of this process, k runs of channels in one group
each, g groups.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from mamba2lm.ops.dispatch import Impl, choose_impl, state_dtype
from mamba2lm.ops.gated_rms_norm.launch import ALIGNED, unsupported
from mamba2lm.ops.kernels import Launches, on_device, signature

PROGRAMS = 264
"""Programs of the kernel that adds the weight's gradient over rows."""
STAGES = 3
"""Rows that such a program has on their way."""


@dataclass(frozen=True)
class Runs:
    """Which channels are normalised together, and by whom.

    Attributes:
        group: The processes.
        group_size: Channels normalised together, counted over all processes.
        mine: The group of each equal run of this process's channels.
        groups: How many groups there are.
    """

    group: ProcessGroup
    group_size: int
    mine: tuple[int, ...]
    groups: int

    def width(self, x: Tensor) -> int:
        """Return the channels of a run of this process's (…, d)."""
        width = x.shape[-1] // len(self.mine)
        assert width * len(self.mine) == x.shape[-1]
        return width


def gated_rms_norm_divided(
    x: Tensor, z: Tensor, weight: Tensor, runs: Runs, *, eps: float, impl: Impl = "auto"
) -> Tensor:
    """Compute ``gated_rms_norm`` of channels of which each process has some.

    Args:
        x: Inputs, (…, d).
        z: Gate, same shape.
        weight: Scale of this process's channels, (d,).
        runs: Which channels are normalised together, and by whom.
        eps: Added to the mean square.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in the dtype of x; computed in float32 (float64 for float64 inputs). Differentiable
        once.

    Raises:
        ValueError: An implementation that does not exist.
    """
    reason = unsupported(x, runs.width(x))
    triton = choose_impl("gated_rms_norm", impl, x, unsupported=reason) == "triton"
    if torch.compiler.is_compiling():
        triton = False  # the compiler traces and fuses the other
    return _Divided.apply(x, z, weight, runs, eps, triton)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        runs: Runs,
        eps: float,
        triton: bool,
    ) -> Tensor:
        y, scale_tk = (forward if triton else _forward)(x, z, weight, runs, eps)
        ctx.save_for_backward(x, z, weight, scale_tk)
        ctx.given = runs, triton
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        runs, triton = ctx.given
        x, z, weight, scale_tk = ctx.saved_tensors
        found = (backward if triton else _backward)(dy, x, z, weight, scale_tk, runs)
        return *found, None, None, None


def _over_processes(sums_tk: Tensor, runs: Runs) -> Tensor:
    """Add runs of one group over all processes; return each of this process's runs its sum."""
    index = None if runs.groups == 1 else _index(runs.mine, sums_tk.device)
    if index is not None:
        sums_tk = sums_tk.new_zeros(sums_tk.shape[0], runs.groups).index_add(1, index, sums_tk)
    if torch.compiler.is_compiling():
        functional = torch.ops._c10d_functional
        total = functional.wait_tensor(functional.all_reduce(sums_tk, "sum", runs.group.group_name))
    else:
        total = sums_tk.contiguous()
        dist.all_reduce(total, group=runs.group)
    return total if index is None else total.index_select(1, index)


def _scales(sums_tk: Tensor, runs: Runs, eps: float) -> Tensor:
    return torch.rsqrt(_over_processes(sums_tk, runs) / runs.group_size + eps)


def _slopes(sums_tk: Tensor, runs: Runs, scale_tk: Tensor) -> Tensor:
    return _over_processes(sums_tk, runs) * (scale_tk**3 / runs.group_size)


@lru_cache
def _index(mine: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the groups as a tensor, made once: making it waits for the device."""
    return torch.tensor(mine, device=device)


def _gated(x: Tensor, z: Tensor, runs: int) -> Tensor:
    wide = state_dtype(x)
    u = x.to(wide) * F.silu(z.to(wide))
    return u.reshape(-1, runs, x.shape[-1] // runs)


def _forward(x: Tensor, z: Tensor, weight: Tensor, runs: Runs, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and every run's scale r (t, k)."""
    u_tkc = _gated(x, z, len(runs.mine))
    scale_tk = _scales(u_tkc.square().sum(dim=2), runs, eps)
    y = (u_tkc * scale_tk.unsqueeze(2)).view(x.shape) * weight.to(u_tkc.dtype)
    # Compiled by torch 2.11, what a cast to the same dtype returns has no gradient.
    return y if y.dtype == x.dtype else y.to(x.dtype), scale_tk


def _backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, scale_tk: Tensor, runs: Runs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and the weight: du = r weight dy - slope u."""
    u_tkc = _gated(x, z, len(runs.mine))
    wide = u_tkc.dtype
    dy_wide, x_wide, z_wide = dy.to(wide), x.to(wide), z.to(wide)
    weighted_tkc = (dy_wide * weight.to(wide)).reshape(u_tkc.shape)
    slope_tk = _slopes((weighted_tkc * u_tkc).sum(dim=2), runs, scale_tk)
    du = scale_tk.unsqueeze(2) * weighted_tkc - slope_tk.unsqueeze(2) * u_tkc
    du = du.view(x.shape)
    dweight = (u_tkc * scale_tk.unsqueeze(2)).view(x.shape) * dy_wide
    gate = torch.sigmoid(z_wide)
    dz = du * x_wide * gate * (1 + z_wide * (1 - gate))
    return (
        (du * z_wide * gate).to(x.dtype),
        dz.to(z.dtype),
        dweight.flatten(0, -2).sum(dim=0).to(weight.dtype),
    )


@lru_cache
def _kernels() -> Any:
    return importlib.import_module("mamba2lm.ops.gated_rms_norm.divided_kernels")


def _sizes(runs: int, width: int, *strides: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the strides of rows and the compile-time sizes of a launch."""
    unit = ALIGNED if all(stride % ALIGNED == 0 for stride in strides) else 1
    block = 1 << (width - 1).bit_length()
    sizes: dict[str, Any] = {"RUNS": runs, "WIDTH": width, "BLOCK": block, "UNIT": unit}
    return tuple(stride // unit for stride in strides), sizes


def _warps(sizes: dict[str, Any]) -> int:
    return max(1, min(8, sizes["BLOCK"] // 256))


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor as rows with unit stride along them, copying only if it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(x: Tensor, z: Tensor, weight: Tensor, runs: Runs, eps: float) -> tuple[Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        x: Inputs, (…, d).
        z: Gate, same shape.
        weight: Scale, (d,).
        runs: Which channels are normalised together.
        eps: Added to the mean square.

    Returns:
        y (…, d) in the dtype of x, and for the backward pass the scale of every run (t, k).
    """
    k, width = len(runs.mine), runs.width(x)
    x_td, z_td, weight = _rows(x), _rows(z), weight.contiguous()
    strides, sizes = _sizes(k, width, x_td.stride(0), z_td.stride(0))
    rows, device = x_td.shape[0], x.device
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    sums_tk = torch.empty(rows, k, dtype=torch.float32, device=device)
    key = (signature(t) for t in (x_td, z_td, weight))
    launch = Launches(device, "divided norm", k, *key)
    with on_device(device):
        launch(
            _kernels().sums_kernel, (rows, k, 1),
            x_td, z_td, x_td, weight, sums_tk, *strides, strides[0],
            warps=_warps(sizes), BACKWARD=False, **sizes,
        )  # fmt: skip
        scale_tk = _scales(sums_tk, runs, eps)
        launch(
            _kernels().normalise_kernel, (rows, k, 1),
            x_td, z_td, weight, scale_tk, y, *strides,
            warps=_warps(sizes), **sizes,
        )  # fmt: skip
    return y, scale_tk


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    scale_tk: Tensor,
    runs: Runs,
    dz_out: Tensor | None = None,
    y_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        dy: Gradient of y, (…, d).
        x, z, weight, runs: As ``forward``.
        scale_tk: As ``forward`` returned it.
        dz_out: Where to write the gradient of z, of one stride for rows and 1 for channels.
        y_out: Where to write y once more, contiguous; None does not compute it.

    Returns:
        The gradients of x, z and the weight.
    """
    k, width = len(runs.mine), runs.width(x)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if dz_out is None else dz_out
    x_td, z_td, dy_td, weight = _rows(x), _rows(z), _rows(dy), weight.contiguous()
    dz_td = dz.view(-1, dz.shape[-1])
    tensors = (x_td, z_td, dy_td, dz_td)
    strides, sizes = _sizes(k, width, *(tensor.stride(0) for tensor in tensors))
    rows, device = x_td.shape[0], x.device
    steps = -(-rows // max(1, PROGRAMS // k))
    programs = -(-rows // steps)
    sums_tk = torch.empty(rows, k, dtype=torch.float32, device=device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=device)
    partial = torch.empty(programs, x_td.shape[1], dtype=torch.float32, device=device)
    key = (signature(t) for t in (*tensors, weight, y_out))
    launch = Launches(device, "divided norm backward", k, *key)
    with on_device(device):
        launch(
            _kernels().sums_kernel, (rows, k, 1),
            x_td, z_td, dy_td, weight, sums_tk, *strides[:3],
            warps=_warps(sizes), BACKWARD=True, **sizes,
        )  # fmt: skip
        slope_tk = _slopes(sums_tk, runs, scale_tk)
        launch(
            _kernels().gradients_kernel, (programs, k, 1),
            x_td, z_td, dy_td, weight, scale_tk, slope_tk, dx, dz_td,
            dx if y_out is None else y_out, partial, *strides, rows, steps,
            warps=_warps(sizes), WANT_Y=y_out is not None, **sizes, STAGES=STAGES,
        )  # fmt: skip
    return dx, dz, partial.sum(dim=0).to(weight.dtype)
