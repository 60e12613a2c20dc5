"""Launch RMS normalisation's Triton kernels, as PyTorch custom operators with gradients.

One pair of kernels serves ``rms_norm``, ``gated_rms_norm`` and ``rms_norm_residual``. Triton itself
is imported on the first launch, so that this module imports everywhere. ``forward`` and
``backward`` are plain functions that a layer with a gradient of its own may call.

Letters: t rows (all leading axes), d channels, k groups of channels.
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

from mamba2lm.ops.kernels import Launches, no_kernels, on_device, signature

WIDEST = 16384
"""Channels of a group that a program can hold."""

MOST_PIECES = 8

ALIGNED = 8
"""Elements by which strides are divided where all of them can be; see ``forward.py``."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel is launched; changes speed, and dweight by the order of its sum."""

    warps: int
    elements: int
    """Elements a thread holds; rows narrower than a program's share are taken several at a time."""
    programs: int
    """Programs there should be; each works through its share of the rows."""
    stages: int = 1
    """Depth of software pipelining over blocks of rows, where shared memory has the room."""
    registers: int | None = None
    """The most that a thread may use; None leaves it to the compiler."""


FORWARD = Blocks(warps=8, elements=32, programs=4224, stages=3)
BACKWARD = Blocks(warps=4, elements=12, programs=264, stages=2)
MIDDLE_BACKWARD = Blocks(warps=4, elements=24, programs=264, stages=3)
NARROW_BACKWARD = Blocks(warps=4, elements=16, programs=264, stages=2)
NARROWEST_BACKWARD = Blocks(warps=2, elements=24, programs=264, stages=3)
GATED_BACKWARD = Blocks(warps=8, elements=24, programs=264, stages=3)
WIDE_GATED_BACKWARD = Blocks(warps=16, elements=8, programs=132, stages=3)
MIDDLE_GATED_BACKWARD = Blocks(warps=8, elements=8, programs=264, stages=3)
NARROW_GATED_BACKWARD = Blocks(warps=4, elements=12, programs=264, stages=3)


def backward_blocks(width: int, gated: bool) -> Blocks:
    """Return how the backward kernel is launched for groups of ``width`` channels."""
    if gated:
        # One row at a time: with two a program takes so many registers that it has a multiprocessor
        # to itself.
        if width <= 1536:
            return NARROW_GATED_BACKWARD
        if width <= 2048:
            return MIDDLE_GATED_BACKWARD
        return WIDE_GATED_BACKWARD if width <= 4096 else GATED_BACKWARD
    if width <= 1024:
        return NARROWEST_BACKWARD
    if width <= 2048:
        return NARROW_BACKWARD
    return MIDDLE_BACKWARD if width <= 2560 else BACKWARD


STAGED_BYTES = 64 * 1024
"""Shared memory that blocks of rows on their way may take; every GPU has as much."""

_override: tuple[Blocks, Blocks] | None = None


def override_blocks(forward: Blocks, backward: Blocks) -> None:
    """Use these for every call (tests and tuning)."""
    global _override
    _override = forward, backward


def tuned_blocks() -> None:
    """Undo ``override_blocks``."""
    global _override
    _override = None


def unsupported(x: Tensor, group_size: int) -> str | None:
    """Say why the kernels cannot take these inputs, or None when they can.

    Args:
        x: Inputs, (…, d).
        group_size: Channels normalised together.
    """
    if (reason := no_kernels(x)) is not None:
        return reason
    if group_size > WIDEST:
        return f"x has groups of {group_size} channels; the kernels take up to {WIDEST}"
    return None


@lru_cache
def cut(width: int) -> tuple[int, int]:
    """Cut a row into pieces of a power of two, with the least padding, then in fewest pieces.

    Args:
        width: Channels of a group.

    Returns:
        The width of a piece and how many there are.
    """
    sizes = [1 << power for power in range(15) if -(-width // (1 << power)) <= MOST_PIECES]
    piece = min(sizes, key=lambda size: (-(-width // size) * size, -size))
    return piece, -(-width // piece)


@lru_cache
def _rows_at_once(width: int, blocks: Blocks) -> int:
    """Return how many rows a program takes at a time, a power of two."""
    piece, pieces = cut(width)
    share = blocks.warps * 32 * blocks.elements // (piece * pieces)
    return 1 << max(0, share.bit_length() - 1)


@lru_cache
def _kernel(module: str, name: str) -> Any:
    """Import a kernel, and Triton with the first."""
    return getattr(importlib.import_module(f"mamba2lm.ops.{module}"), name)


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor as rows with unit stride along them, copying only if it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _out(given: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor to write to, as given or allocated."""
    if given is None:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    assert given.shape == like.shape
    assert given.stride(-1) == 1
    return given


def _unit(*sizes: int) -> int:
    return ALIGNED if all(size % ALIGNED == 0 for size in sizes) else 1


def _stages(blocks: Blocks, elements: int, *inputs: Tensor | None) -> int:
    """Return the depth of pipelining that fits, for programs that load so many elements at once."""
    staged = elements * sum(tensor.element_size() for tensor in inputs if tensor is not None)
    return blocks.stages if staged * (blocks.stages - 1) <= STAGED_BYTES else 1


def _share(rows: int, block: int, groups: int, programs: int) -> tuple[int, int]:
    """Return how many programs a group gets and how many blocks of rows each takes."""
    blocks = -(-rows // block)
    steps = max(1, -(-blocks * groups // programs))
    return -(-blocks // steps), steps


def forward(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        x: Inputs, (…, d); read where they lie if rows have one stride and channels stride 1.
        z: Gate of the same shape, or None.
        residual: Residual stream of the same shape, added to x before, or None.
        weight: Scale, (d,), any float dtype.
        eps: Added to the mean square.
        group_size: Channels normalised together.
        dtype: Of the normalised result.

    Returns:
        The normalised result, contiguous; x + residual in the dtype of ``residual``, empty without
        one; 1 / root mean square per row and group, (t, k), float32.
    """
    rows, d = x.numel() // x.shape[-1], x.shape[-1]
    groups = d // group_size
    blocks = FORWARD if _override is None else _override[0]
    piece, pieces = cut(group_size)
    block = _rows_at_once(group_size, blocks)
    programs, steps = _share(rows, block, groups, blocks.programs)
    device = x.device
    y = torch.empty(x.shape, dtype=dtype, device=device)
    total = torch.empty(
        (0,) if residual is None else x.shape,
        dtype=x.dtype if residual is None else residual.dtype, device=device,
    )  # fmt: skip
    scale = torch.empty(rows, groups, dtype=torch.float32, device=device)
    x_rows = _rows(x)
    z_rows = x_rows if z is None else _rows(z)
    residual_rows = x_rows if residual is None else _rows(residual)
    strides = (x_rows.stride(0), z_rows.stride(0), residual_rows.stride(0))
    unit = _unit(*strides)
    key = (signature(t) for t in (x, z, residual, weight))
    launch = Launches(device, "rms_norm", blocks, group_size, dtype, *key)
    with on_device(device):
        launch(
            _kernel("gated_rms_norm.forward", "rms_norm_kernel"), (programs * groups, 1, 1),
            x_rows, z_rows, residual_rows, weight.contiguous(), y, total, scale,
            *(stride // unit for stride in strides), rows, groups, steps, eps,
            warps=blocks.warps, registers=blocks.registers,
            GATED=z is not None, ADD=residual is not None, ROWS=block, WIDTH=group_size,
            PIECE=piece, PIECES=pieces, UNIT=unit,
            STAGES=_stages(blocks, block * piece * pieces, x, z, residual),
        )  # fmt: skip
    return y, total, scale


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
    dx_out: Tensor | None = None,
    dz_out: Tensor | None = None,
    y_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        dy: Gradient of the normalised result, (…, d).
        dtotal: Gradient of x + residual, (…, d), or None for zero.
        x: Inputs, (…, d); x + residual as ``forward`` returned it where there was a residual.
        z: Gate, or None.
        weight: Scale, (d,).
        scale: As ``forward`` returned it.
        group_size: Channels normalised together.
        dtype: Of the gradient of x.
        dx_out: Where to write the gradient of x, (…, d), of one stride for rows and 1 for channels;
            None allocates it.
        dz_out: The same for z: a slice of the gradient of a fused projection, for one.
        y_out: The same for the normalised result, computed again; None does not compute it.

    Returns:
        The gradient of x, in ``dtype``; of z, empty without a gate; of x + residual, in the dtype
        of x, empty if that is ``dtype`` (it equals the gradient of x then); of the weight.
    """
    rows, d = x.numel() // x.shape[-1], x.shape[-1]
    groups = d // group_size
    tuned = backward_blocks(group_size, z is not None)
    blocks = tuned if _override is None else _override[1]
    piece, pieces = cut(group_size)
    block = _rows_at_once(group_size, blocks)
    programs, steps = _share(rows, block, groups, blocks.programs)
    device = x.device
    two = x.dtype != dtype
    dx = _out(dx_out, x, dtype)
    dz = torch.empty(0, device=device) if z is None else _out(dz_out, z, z.dtype)
    dresidual = torch.empty(x.shape if two else (0,), dtype=x.dtype, device=device)
    partial = torch.empty(programs, 1, d, dtype=torch.float32, device=device)
    x_rows, dy_rows, dx_rows = _rows(x), _rows(dy), dx.view(-1, d)
    dtotal_rows = x_rows if dtotal is None else _rows(dtotal)
    z_rows, dz_rows = (x_rows, x_rows) if z is None else (_rows(z), dz.view(-1, d))
    y_rows = dx_rows if y_out is None else y_out.view(-1, d)
    tensors = (dy_rows, dtotal_rows, x_rows, z_rows, dx_rows, dz_rows, y_rows)
    strides = [tensor.stride(0) for tensor in tensors]
    unit = _unit(*strides)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    given = (dy, dtotal, x, z, weight, dx_out, dz_out, y_out)
    key = (signature(t) for t in given)
    launch = Launches(device, "rms_norm backward", blocks, group_size, dtype, *key)
    with on_device(device):
        launch(
            _kernel("gated_rms_norm.backward", "rms_norm_backward_kernel"),
            (programs * groups, 1, 1),
            dy_rows, dtotal_rows, x_rows, z_rows, weight.contiguous(), scale,
            dx_rows, dz_rows, dresidual, y_rows, partial,
            *(stride // unit for stride in strides), rows, groups, steps,
            warps=blocks.warps, registers=blocks.registers,
            GATED=z is not None, HAS_DSUM=dtotal is not None, TWO_DTYPES=two,
            WANT_Y=y_out is not None, ROWS=block, WIDTH=group_size, PIECE=piece, PIECES=pieces,
            UNIT=unit,
            STAGES=_stages(blocks, block * piece * pieces, dy, dtotal, x, z),
        )  # fmt: skip
        _kernel("partial_sums", "add_partial_sums")(launch, partial, dweight.view(d, 1))
    return dx, dz, dresidual, dweight


def _backward_anew(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels into new tensors, the form that a custom operator may have."""
    return backward(dy, dtotal, x, z, weight, scale, group_size, dtype)


forward_op = torch.library.custom_op("mamba2lm::rms_norm_forward", forward, mutates_args=())
backward_op = torch.library.custom_op(
    "mamba2lm::rms_norm_backward", _backward_anew, mutates_args=()
)


@forward_op.register_fake
def _(
    x: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    d = x.shape[-1]
    scale = x.new_empty(x.numel() // d, d // group_size, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), total, scale


@backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(0, dtype=torch.float32) if z is None else z.new_empty(z.shape),
        x.new_empty(x.shape if x.dtype != dtype else 0),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, residual, weight, _, group_size, _ = inputs
    _, total, scale = output
    ctx.save_for_backward(x if residual is None else total, z, weight, scale)
    ctx.group_size, ctx.dtype, ctx.has_residual = group_size, x.dtype, residual is not None
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, z, weight, scale = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(x.shape, dtype=ctx.dtype, device=x.device)
    if not ctx.has_residual:
        dtotal = None  # compiled code sends a gradient of the empty result too
    dx, dz, dresidual, dweight = run(dy, dtotal, x, z, weight, scale, ctx.group_size, ctx.dtype)
    if not ctx.has_residual:
        dresidual = None
    elif x.dtype == ctx.dtype:
        dresidual = dx
    return dx, None if z is None else dz, dresidual, dweight, None, None, None


def _backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    return _gradients(backward_op, ctx, dy, dtotal)


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without the custom operator's dispatch, which eager code need not pay."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _gradients(backward, ctx, dy, dtotal)


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    z: Tensor | None = None,
    residual: Tensor | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise with the Triton kernels; differentiable once in every tensor.

    Args:
        x: Inputs, (…, d); bfloat16, float16 or float32.
        weight: Scale, (d,).
        eps: Added to the mean square.
        z: Gate of the same shape, or None.
        residual: Residual stream of the same shape, added to x before, or None; not with a gate.
        group_size: Channels normalised together, dividing d; None means all.
        dtype: Of the normalised result; None means that of x.

    Returns:
        The normalised result (…, d), and x + residual in the dtype of ``residual``, empty without
        one.
    """
    assert z is None or residual is None
    arguments = (
        x, z, residual, weight, eps, x.shape[-1] if group_size is None else group_size,
        x.dtype if dtype is None else dtype,
    )  # fmt: skip
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    y, total, _ = run(*arguments)
    return y, total
