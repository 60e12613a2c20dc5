"""The gated norm where groups of channels are divided over processes.

One number a token and group crosses them in each pass; all else is local. On a GPU the local parts
are Triton kernels, elsewhere PyTorch.

Letters: t rows (all leading axes), d channels of this process, k runs of channels in one group
each, g groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from mamba2lm.ops.dispatch import Impl, choose_impl, state_dtype
from mamba2lm.ops.gated_rms_norm.launch import ALIGNED, unsupported
from mamba2lm.ops.kernels import Launches, on_device, signature

PROGRAMS = 528
"""Programs of the kernel that adds the weight's gradient over rows."""


def gated_rms_norm_divided(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    group: ProcessGroup,
    *,
    eps: float,
    group_size: int,
    mine: Sequence[int],
    groups: int,
    impl: Impl = "auto",
) -> Tensor:
    """Compute ``gated_rms_norm`` of channels of which each process has some.

    Args:
        x: Inputs, (…, d).
        z: Gate, same shape.
        weight: Scale of this process's channels, (d,).
        group: The processes.
        eps: Added to the mean square.
        group_size: Channels normalised together, counted over all processes.
        mine: The group of each equal run of this process's channels.
        groups: How many groups there are.
        impl: ``"auto"`` (the kernels on a GPU where they apply), ``"triton"`` or ``"reference"``.

    Returns:
        (…, d) in the dtype of x; computed in float32 (float64 for float64 inputs). Differentiable
        once.

    Raises:
        ValueError: An implementation that does not exist.
    """
    runs = len(mine)
    width = x.shape[-1] // runs
    assert width * runs == x.shape[-1]
    chosen = choose_impl("gated_rms_norm", impl, x, unsupported=unsupported(x, width))
    if torch.compiler.is_compiling():
        chosen = "reference"  # which the compiler fuses, and traces
    return _Divided.apply(x, z, weight, group, eps, group_size, tuple(mine), groups, chosen)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        group: ProcessGroup,
        eps: float,
        group_size: int,
        mine: tuple[int, ...],
        groups: int,
        chosen: str,
    ) -> Tensor:
        runs = len(mine)
        triton = chosen == "triton"
        x_td, z_td = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, z))
        sums_tk = (_launch_sums if triton else _sums)(x_td, z_td, None, weight, runs)
        mean_tk = _over_processes(sums_tk, group, mine, groups) / group_size
        scale_tk = torch.rsqrt(mean_tk + eps)
        ctx.save_for_backward(x, z, weight, scale_tk)
        ctx.given = group, group_size, mine, groups, triton
        y_td = (_launch_normalised if triton else _normalised)(x_td, z_td, weight, scale_tk)
        return y_td.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, z, weight, scale_tk = ctx.saved_tensors
        group, group_size, mine, groups, triton = ctx.given
        x_td, z_td, dy_td = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, z, dy))
        sums_tk = (_launch_sums if triton else _sums)(x_td, z_td, dy_td, weight, len(mine))
        slope_tk = _over_processes(sums_tk, group, mine, groups) * (scale_tk**3 / group_size)
        dx_td, dz_td, dweight = (_launch_gradients if triton else _gradients)(
            x_td, z_td, dy_td, weight, scale_tk, slope_tk
        )
        return dx_td.view(x.shape), dz_td.view(z.shape), dweight, *[None] * 6


def _over_processes(
    sums_tk: Tensor, group: ProcessGroup, mine: tuple[int, ...], groups: int
) -> Tensor:
    """Add runs of one group over all processes; return each of this process's runs its sum."""
    index = None if groups == 1 else _index(mine, sums_tk.device)
    if index is not None:
        sums_tk = sums_tk.new_zeros(sums_tk.shape[0], groups).index_add(1, index, sums_tk)
    functional = torch.ops._c10d_functional  # which torch.compile can trace
    total = functional.wait_tensor(functional.all_reduce(sums_tk, "sum", group.group_name))
    return total if index is None else total.index_select(1, index)


@lru_cache
def _index(mine: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the groups as a tensor, made once: making it waits for the device."""
    return torch.tensor(mine, device=device)


def _gated(x_td: Tensor, z_td: Tensor, runs: int) -> Tensor:
    wide = state_dtype(x_td)
    return (x_td.to(wide) * F.silu(z_td.to(wide))).unflatten(1, (runs, -1))


def _sums(x_td: Tensor, z_td: Tensor, dy_td: Tensor | None, weight: Tensor, runs: int) -> Tensor:
    u_tkc = _gated(x_td, z_td, runs)
    if dy_td is None:
        return u_tkc.square().sum(dim=2)
    scaled_td = dy_td.to(u_tkc.dtype) * weight.to(u_tkc.dtype)
    return (scaled_td.view(u_tkc.shape) * u_tkc).sum(dim=2)


def _normalised(x_td: Tensor, z_td: Tensor, weight: Tensor, scale_tk: Tensor) -> Tensor:
    u_tkc = _gated(x_td, z_td, scale_tk.shape[1])
    y_td = (u_tkc * scale_tk.unsqueeze(2)).flatten(1) * weight.to(u_tkc.dtype)
    return y_td.to(x_td.dtype)


def _gradients(
    x_td: Tensor, z_td: Tensor, dy_td: Tensor, weight: Tensor, scale_tk: Tensor, slope_tk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and the weight: du = r weight dy - slope u."""
    runs = scale_tk.shape[1]
    u_tkc = _gated(x_td, z_td, runs)
    wide = u_tkc.dtype
    dy_tkc = dy_td.to(wide).unflatten(1, (runs, -1))
    scaled_tkc = dy_tkc * scale_tk.unsqueeze(2)
    dweight = (scaled_tkc * u_tkc).sum(dim=0).flatten()
    du_td = (scaled_tkc * weight.to(wide).view(runs, -1) - slope_tk.unsqueeze(2) * u_tkc).flatten(1)
    z_td_wide = z_td.to(wide)
    gate_td = torch.sigmoid(z_td_wide)
    dx_td = du_td * z_td_wide * gate_td
    dz_td = du_td * x_td.to(wide) * gate_td * (1 + z_td_wide * (1 - gate_td))
    return dx_td.to(x_td.dtype), dz_td.to(z_td.dtype), dweight.to(weight.dtype)


@lru_cache
def _kernels() -> Any:
    return importlib.import_module("mamba2lm.ops.gated_rms_norm.divided_kernels")


def _constants(runs: int, *tensors: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the strides of rows and the compile-time sizes of a launch."""
    strides = tuple(tensor.stride(0) for tensor in tensors)
    unit = ALIGNED if all(stride % ALIGNED == 0 for stride in strides) else 1
    width = tensors[0].shape[1] // runs
    block = 1 << (width - 1).bit_length()
    sizes: dict[str, Any] = {"RUNS": runs, "WIDTH": width, "BLOCK": block, "UNIT": unit}
    return tuple(stride // unit for stride in strides), sizes


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]


def _launch_sums(
    x_td: Tensor, z_td: Tensor, dy_td: Tensor | None, weight: Tensor, runs: int
) -> Tensor:
    x_td, z_td, dy_rows = _rows(x_td, z_td, x_td if dy_td is None else dy_td)
    strides, sizes = _constants(runs, x_td, z_td, dy_rows)
    sums_tk = torch.empty(x_td.shape[0], runs, dtype=torch.float32, device=x_td.device)
    key = (signature(t) for t in (x_td, z_td, dy_td, weight))
    launch = Launches(x_td.device, "divided norm sums", runs, *key)
    with on_device(x_td.device):
        launch(
            _kernels().sums_kernel, (x_td.shape[0], runs, 1),
            x_td, z_td, dy_rows, weight.contiguous(), sums_tk, *strides,
            warps=_warps(sizes["BLOCK"]), BACKWARD=dy_td is not None, **sizes,
        )  # fmt: skip
    return sums_tk


def _launch_normalised(x_td: Tensor, z_td: Tensor, weight: Tensor, scale_tk: Tensor) -> Tensor:
    x_td, z_td = _rows(x_td, z_td)
    runs = scale_tk.shape[1]
    strides, sizes = _constants(runs, x_td, z_td)
    y_td = torch.empty(x_td.shape, dtype=x_td.dtype, device=x_td.device)
    key = (signature(t) for t in (x_td, z_td, weight))
    launch = Launches(x_td.device, "divided norm", runs, *key)
    with on_device(x_td.device):
        launch(
            _kernels().normalise_kernel, (x_td.shape[0], runs, 1),
            x_td, z_td, weight.contiguous(), scale_tk.contiguous(), y_td, *strides,
            warps=_warps(sizes["BLOCK"]), **sizes,
        )  # fmt: skip
    return y_td


def _launch_gradients(
    x_td: Tensor, z_td: Tensor, dy_td: Tensor, weight: Tensor, scale_tk: Tensor, slope_tk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x_td, z_td, dy_td = _rows(x_td, z_td, dy_td)
    rows, runs = scale_tk.shape
    strides, sizes = _constants(runs, x_td, z_td, dy_td)
    steps = -(-rows // max(1, PROGRAMS // runs))
    programs = -(-rows // steps)
    device = x_td.device
    dx_td = torch.empty(x_td.shape, dtype=x_td.dtype, device=device)
    dz_td = torch.empty(z_td.shape, dtype=z_td.dtype, device=device)
    partial = torch.empty(programs, x_td.shape[1], dtype=torch.float32, device=device)
    key = (signature(t) for t in (x_td, z_td, dy_td, weight))
    launch = Launches(device, "divided norm gradients", runs, *key)
    with on_device(device):
        launch(
            _kernels().gradients_kernel, (programs, runs, 1),
            x_td, z_td, dy_td, weight.contiguous(), scale_tk.contiguous(), slope_tk.contiguous(),
            dx_td, dz_td, partial, *strides, rows, steps,
            warps=_warps(sizes["BLOCK"]), **sizes,
        )  # fmt: skip
    return dx_td, dz_td, partial.sum(dim=0).to(weight.dtype)
