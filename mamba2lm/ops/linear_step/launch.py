"""Launch the kernels of ``linear_step``. Triton itself is imported on the first launch.

How a shape is launched is read from ``tuned/*.json``, one file per GPU generation, written by
``benchmarks/tune_steps.py``. Shapes that are not there are launched by rule where there is one row,
and left to a library's product where there are more.

Letters: b rows, k inputs, n outputs.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba2lm.ops.kernels import (
    Launches,
    chains,
    compute_capability,
    needs_gradients,
    no_kernels,
    on_device,
    signature,
)

if TYPE_CHECKING:
    from mamba2lm.ops.linear_step.reference import Convolution, Norm, Scale

ROWS = (1, 8, 16, 32, 64)
"""Rows that are tuned for; a batch counts as the next larger. More are left to a library."""

MOST_TILES = 32
"""Tiles of one row's inputs at most, which are unrolled."""

MOST_GROUPS = 16

MOST_TAPS = 4

MOST_INPUTS = 32768
"""That are normalised together."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel is launched; changes speed, and results by the order of sums only."""

    n: int
    """Outputs per program, a power of two."""
    k: int
    """Inputs per tile, a power of two, as far as a group has so many."""
    warps: int
    rows: int = 0
    """Rows per program through ``tl.dot``, at least 8; 0 for one row without it."""
    stages: int = 1
    """Depth of software pipelining with ``rows``."""
    folded: bool = True
    """With ``rows``: whether every program normalises what it reads; else a kernel does before."""
    ahead: int = 4
    """Tiles asked for before waiting for the previous kernel; a power of two with ``rows``."""
    split: int = 1
    """With ``rows``: programs that share an output's inputs; the norm is then not folded."""
    flip: bool = False
    """With ``rows``: whether the rows are the left factor."""


MOST_SHARED = 8192
"""Tiles of outputs that several programs may share."""

FEWEST_SCALED = 2
"""Rows from which on a state update leaves the factor of its layer's norm to the product behind it,
where that is a kernel of ours: measured, 130M steps of 8 rows take 5 to 7 % less and of 64 up to
2.5 %. One row's product normalises in passing, and neither gains nor loses."""

_override: Blocks | None = None
_scales: bool | None = None


def override_blocks(blocks: Blocks | None) -> None:
    """Use these for every call (tests and tuning); None undoes it."""
    global _override
    _override = blocks


def scales(rows: int) -> bool:
    """Return whether a state update leaves its layer's norm to the product behind it."""
    return rows >= FEWEST_SCALED if _scales is None else _scales


def override_scales(scales: bool | None) -> None:
    """Let it, or not (tests and tuning); None undoes it."""
    global _scales
    _scales = scales


@lru_cache
def arrivals(device: torch.device) -> Tensor:
    """Return counts of programs that have left their part, all 0 between two kernels.

    Kernels of one stream may share them: the next waits until all of this one have ended.
    """
    return torch.zeros(MOST_SHARED, dtype=torch.int32, device=device)


@lru_cache
def tuned(major: int) -> dict[tuple[int, int, int], Blocks | None]:
    """Read the choices for a generation of GPUs.

    Args:
        major: Major compute capability; 0 for none.

    Returns:
        By (rows, outputs, inputs): how to launch, or None where a library's product is faster.
    """
    path = Path(__file__).parent / "tuned" / f"sm{major}0.json"
    if not path.is_file():
        return {}
    return {
        (entry["rows"], entry["n"], entry["k"]): Blocks(**entry["use"]) if entry["use"] else None
        for entry in json.loads(path.read_text("utf-8"))["shapes"]
    }


@lru_cache(maxsize=1024)
def choose_blocks(major: int, rows: int, n: int, k: int, *, wide: bool) -> Blocks | None:
    """Return how to launch for a shape, or None to leave it to a library.

    Args:
        major: Major compute capability; 0 for none.
        rows: Tokens.
        n: Outputs.
        k: Inputs.
        wide: Whether the weight is float32, which nothing is tuned for.
    """
    if wide:
        return Blocks(n=4, k=256, warps=4, ahead=4) if rows == 1 else None
    held = next((size for size in ROWS if rows <= size), None)
    if held is None:
        return None
    if (held, n, k) in tuned(major):
        return tuned(major)[held, n, k]
    if held > 1:
        return None
    if n < 1024 and k > 4096:
        return Blocks(n=1, k=1024, warps=4, ahead=5)
    if k > 4096:
        return Blocks(n=4, k=1024, warps=4, ahead=5)
    if k > 1024 and n < 4096:
        return Blocks(n=4, k=512, warps=4, ahead=10)
    return Blocks(n=8, k=256, warps=4, ahead=10)


def _blocks(x: Tensor, weight: Tensor) -> Blocks | None:
    if _override is not None:
        return _override
    wide = weight.element_size() > 2
    return choose_blocks(compute_capability(x.device), x.shape[0], *weight.shape, wide=wide)


def unsupported(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None,
    gate: Tensor | None,
    convolution: Convolution | None,
    residual: Tensor | None,
    scale: Scale | None = None,
) -> str | None:
    """Say why the kernels do not take these inputs, or None when they do."""
    if (reason := no_kernels(x) or no_kernels(weight)) is not None:
        return reason
    if (reason := needs_gradients(x, weight, residual)) is not None:
        return reason
    blocks = _blocks(x, weight)
    if blocks is None:
        return f"x has {x.shape[0]} rows, for which a library's product is faster"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if any(t is not None and t.stride(1) != 1 for t in (x, gate, residual)):
        return "rows do not have unit stride"
    if norm is not None and (norm.group_size or x.shape[1]) > MOST_INPUTS:
        return f"the norm is over more than {MOST_INPUTS} inputs"
    if convolution is not None and (
        convolution.weight.shape[1] > MOST_TAPS
        or not convolution.weight.is_contiguous()
        or not convolution.state[:1].is_contiguous()
    ):
        return f"the convolution has over {MOST_TAPS} taps, or its tensors are not contiguous"
    k = x.shape[1]
    group = _group(k, norm, scale)
    tiles = (k // group) * -(-group // _tile(blocks, group))
    if (not blocks.rows and tiles > MOST_TILES) or k // group > MOST_GROUPS:
        return f"x has {k // group} groups of {group} inputs, too many tiles for one program"
    return None


def _group(k: int, norm: Norm | None, scale: Scale | None) -> int:
    """Return the inputs that are normalised together."""
    size = norm.group_size if norm is not None else scale.group_size if scale is not None else None
    return size or k


def _tile(blocks: Blocks, group: int) -> int:
    """Return the inputs of a tile: no more than a group has, and 16 for the tensor cores."""
    return min(blocks.k, max(16, 1 << (group - 1).bit_length()))


@lru_cache
def _kernel(name: str) -> Any:
    """Import a kernel, and Triton with the first."""
    return getattr(importlib.import_module("mamba2lm.ops.linear_step.step"), name)


def linear_step_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gate: Tensor | None,
    convolution: Convolution | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    scale: Scale | None = None,
) -> Tensor:
    """Run the kernel.

    Args:
        dtype: Of the result without a residual.

    Other Args: as ``linear_step``; what ``unsupported`` lets pass.
    """
    (b, k), n = x.shape, weight.shape[0]
    device = x.device
    y = torch.empty(b, n, dtype=dtype if residual is None else residual.dtype, device=device)
    if b == 0:
        return y
    blocks = _blocks(x, weight)
    assert blocks is not None
    group = _group(k, norm, scale)
    taps = 0 if convolution is None else convolution.weight.shape[1]
    if norm is not None and blocks.rows and (blocks.split > 1 or not blocks.folded):
        x = normalised(x, norm, gate, weight.dtype)
        norm, gate, group = None, None, k
    chain = chains(device, weight, None if norm is None else norm.weight)
    tile = _tile(blocks, group)
    # A pointer that the kernel does not follow must still be one.
    kept = x if convolution is None or taps == 1 else convolution.state
    taps_bias = None if convolution is None else convolution.bias
    tensors = (x, weight, bias, gate, residual, kept)
    tensors += () if norm is None else (norm.weight,)
    tensors += () if scale is None else (scale.squares,)
    tensors += () if convolution is None else (convolution.weight, taps_bias)
    start, channels = (
        (0, 0) if convolution is None else (convolution.start, convolution.weight.shape[0])
    )
    launch = Launches(
        device, "linear_step", blocks, group, dtype, *map(signature, tensors),
        norm is None, gate is None, scale is None, channels, start, chain,
    )  # fmt: skip
    pointers = (
        x, x if gate is None else gate, x if norm is None else norm.weight, weight,
        x if bias is None else bias, x if residual is None else residual, y,
        x if convolution is None else convolution.weight, x if taps_bias is None else taps_bias,
        kept, x if scale is None else scale.squares,
    )  # fmt: skip
    eps = norm.eps if norm is not None else scale.eps if scale is not None else 1e-5
    parts = {
        "NORMED": norm is not None, "GATED": gate is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "TAPS": taps, "HAS_TAPS_BIAS": taps_bias is not None,
        "SQUARES": 0 if scale is None else scale.squares.shape[1] * group // k,
        "GROUPS": k // group, "WIDTH": group,
    }  # fmt: skip
    with on_device(device):
        if blocks.rows:
            grid = (-(-n // blocks.n), -(-b // blocks.rows), blocks.split)
            shared, arrived = y, y
            if blocks.split > 1:
                assert norm is None
                assert grid[0] * grid[1] <= MOST_SHARED
                size = grid[0] * grid[1] * blocks.split * blocks.n * blocks.rows
                shared = torch.empty(size, dtype=torch.float32, device=device)
                arrived = arrivals(device)
            launch(
                _kernel("rows_kernel"), grid, *pointers, shared, arrived,
                b, n, k, x.stride(0), 0 if gate is None else gate.stride(0),
                0 if residual is None else residual.stride(0), kept.stride(0), start, channels,
                eps, warps=blocks.warps, stages=blocks.stages, chain=chain,
                **parts, ROWS=blocks.rows, BLOCK_N=blocks.n, BLOCK_K=tile, STAGES=blocks.stages,
                SPLIT=blocks.split, FLIP=blocks.flip, AHEAD=blocks.ahead, CHAIN=chain,
            )  # fmt: skip
        else:
            assert b == 1
            tiles = (k // group) * -(-group // tile)
            launch(
                _kernel("vector_kernel"), (-(-n // blocks.n), 1, 1), *pointers,
                n, k, start, channels, eps, warps=blocks.warps, chain=chain,
                **parts, BLOCK_N=blocks.n, BLOCK_K=tile, AHEAD=min(blocks.ahead, tiles),
                CHAIN=chain,
            )  # fmt: skip
    return y


def normalised(x: Tensor, norm: Norm, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Run the norm of ``linear_step`` in a kernel of its own; returns (b, k) in ``dtype``."""
    b, k = x.shape
    group = norm.group_size or k
    y = torch.empty(b, k, dtype=dtype, device=x.device)
    chain = chains(x.device, norm.weight)
    key = (signature(t) for t in (x, gate, norm.weight))
    launch = Launches(x.device, "linear_step norm", group, dtype, chain, *key)
    with on_device(x.device):
        launch(
            _kernel("norm_kernel"), (b, k // group, 1),
            x, x if gate is None else gate, norm.weight, y,
            x.stride(0), 0 if gate is None else gate.stride(0), k, norm.eps,
            warps=8, chain=chain,
            GATED=gate is not None, WIDTH=group, BLOCK=1 << (group - 1).bit_length(), CHAIN=chain,
        )  # fmt: skip
    return y
