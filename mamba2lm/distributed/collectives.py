"""Collectives with their gradients; compiled, as the functional ones that torch.compile traces.

Which gradient is right depends on what the other processes do with the result. Where all of them
compute the same afterwards, every process has the whole gradient already; where each computes its
own part, the gradients are parts of a sum. The names below say which.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# The operators below torch's functional collectives, whose Python names change between versions.
# Eager code does not take them: each costs the host a tenth of a millisecond.
_functional = torch.ops._c10d_functional
# Their names since torch 2.13, which warns of the older ones.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """Pass on a tensor that all processes hold, to computations that differ between them.

    The gradient is the sum of theirs.
    """
    return _CopyToParts.apply(x, group)


def sum_of_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add a tensor over processes; all of them compute the same with the sum.

    The gradient passes unchanged.
    """
    return _SumOfParts.apply(x, group)


def sum_for_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add a tensor over processes that go on to compute different things with the sum.

    The gradient is added over them too.
    """
    return _CopyToParts.apply(_SumOfParts.apply(x, group), group)


def gather_for_parts(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Join every process's part along ``dim``; they compute different things with the whole.

    The gradient is a reduce-scatter: the sum of theirs, to each its part.
    """
    return _GatherForParts.apply(x, dim, group)


def scatter_sum_of_parts(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Add a tensor over processes and leave each its part of the sum along ``dim``.

    The gradient is an all-gather.
    """
    return _ScatterSumOfParts.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Join every process's part along ``dim``; all of them compute the same with the whole.

    The gradient is this process's part of what each has.
    """
    return _GatherSame.apply(x, dim, group)


class _CopyToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(dx, ctx.group), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dx, None


class _GatherForParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(dx, ctx.dim, ctx.group), None, None


class _ScatterSumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(dx, ctx.dim, ctx.group), None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.dim, ctx.group, ctx.size = dim, group, x.shape[dim]
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dx.narrow(ctx.dim, ctx.group.rank() * ctx.size, ctx.size), None, None


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Join every process's tensor along ``dim``, without a gradient."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        whole = _functional.all_gather_into_tensor(x, group.size(), group.group_name)
        whole = _functional.wait_tensor(whole)
    else:
        whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        _gather_into(whole, x, group=group)
    return whole if dim == 0 else torch.cat(whole.chunk(group.size()), dim=dim)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add a tensor over processes, without a gradient."""
    if torch.compiler.is_compiling():
        total = _functional.all_reduce(x.contiguous(), "sum", group.group_name)
        return _functional.wait_tensor(total)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Add a tensor over processes and leave each its part along ``dim``, without a gradient."""
    if dim:
        x = torch.cat(x.chunk(group.size(), dim=dim))
    x = x.contiguous()
    if torch.compiler.is_compiling():
        part = _functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)
        return _functional.wait_tensor(part)
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_into(part, x, group=group)
    return part
