"""Launch the kernels of one token of both recurrences. Triton is imported on the first launch.

Letters: b batch, h heads, p head dim, g groups, d channels, n state.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.discretisation import limit_binds
from mamba2lm.ops.kernels import (
    Launches,
    chains,
    needs_gradients,
    no_kernels,
    on_device,
    signature,
)

LARGEST_STATE = 1024
"""States per channel that a program can hold a row of."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel is launched; changes speed, never the result."""

    rows: int
    """Rows of the state per program, a power of two, as far as there are so many."""
    warps: int


_override: Blocks | None = None


def override_blocks(blocks: Blocks | None) -> None:
    """Use these for every call (tests and tuning); None undoes it."""
    global _override
    _override = blocks


def choose_blocks(elements: int, n: int) -> Blocks:
    """Return how to launch for a state.

    Args:
        elements: Of the whole state.
        n: States per channel.
    """
    # Few programs with much to load at once where there is much, many where there is little.
    share = 8192 if elements >= 1 << 23 else 2048
    return Blocks(rows=max(1, share // max(n, 1)), warps=4)


def unsupported(state: Tensor, x: Tensor, *others: Tensor | None) -> str | None:
    """Say why the kernels cannot take these inputs, or None when they can."""
    if (reason := no_kernels(x) or no_kernels(state)) is not None:
        return reason
    if state.shape[-1] > LARGEST_STATE:
        return f"state has {state.shape[-1]} states per channel; up to {LARGEST_STATE} are taken"
    return needs_gradients(state, x, *others)


@lru_cache
def _kernel(name: str) -> Any:
    """Import a kernel, and Triton with the first."""
    return getattr(importlib.import_module("mamba2lm.ops.state_update.step"), name)


def _by_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with everything but its batch axis contiguous, copying only if it must."""
    return tensor if tensor.shape[0] == 0 or tensor[0].is_contiguous() else tensor.contiguous()


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def state_step_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    A_is_log: bool,
    in_place: bool,
    early: bool,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the kernel of the recurrence that the state belongs to.

    Args:
        state: (b, h, p, n) for Mamba-2, (b, d, n) for Mamba-1.
        norm: Of Mamba-2: what y is multiplied by after its squares have been summed, (h·p,).

    Other Args: as ``ssd_state_update`` and ``selective_state_update``.

    Returns:
        y in the shape and dtype of x, the new state, which is ``state`` if ``in_place``, and with
        ``norm`` sums of squares of equal parts of y in order, (b, parts) float32.
    """
    heads = state.ndim == 4
    n = state.shape[-1]
    device = x.device
    kept = state
    state, x, dt, B, C = map(_by_rows, (state, x, dt, B, C))
    z = None if z is None else _by_rows(z)
    if in_place:
        assert state is kept, "a state that is updated in place must be contiguous in each row"
    new = state if in_place else torch.empty_like(state)
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    if x.numel() == 0:
        return y, new, None if norm is None else y.new_zeros(x.shape[0], 1, dtype=torch.float32)
    chain = chains(device, A, norm)
    A = A.contiguous()
    D, dt_bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
    blocks = _override or choose_blocks(state.numel(), n)
    size = state.shape[-2]
    rows = min(blocks.rows, _power(size))
    low, high = dt_limit
    clamp = limit_binds(dt_softplus, low, high)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, norm)
    options = (dt_softplus, clamp, A_is_log, in_place, early, chain)
    launch = Launches(device, "state_step", blocks, options, *map(signature, tensors))
    pointers = (
        state, x, dt, A, B, C, A if D is None else D, x if z is None else z,
        A if dt_bias is None else dt_bias, y, new, state.stride(0), x.stride(0), dt.stride(0),
        B.stride(0), C.stride(0), 0 if z is None else z.stride(0), new.stride(0),
    )  # fmt: skip
    flags = {
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus,
        "CLAMP": clamp, "LOGARITHM": A_is_log,
    }  # fmt: skip
    ends = {"BLOCK_N": _power(n), "EARLY": early, "CHAIN": chain}
    per_head = -(-size // rows)
    batch = x.shape[0]
    squares: Tensor | None = None
    if norm is not None:
        assert heads
        norm = norm.contiguous()
        parts = x.shape[1] * per_head
        squares = torch.empty(batch, parts, dtype=torch.float32, device=device)
    with on_device(device):
        if heads:
            h = x.shape[1]
            launch(
                _kernel("ssd_step_kernel"), (h * per_head, batch, 1), *pointers[:11],
                A if norm is None else norm, y if squares is None else squares, *pointers[11:],
                h, h // B.shape[1], low, high, warps=blocks.warps, chain=chain,
                HAS_D=D is not None, D_WIDE=D is not None and D.ndim == 2,
                NORMED=norm is not None, **flags,
                P=size, N=n, BLOCK_P=rows, **ends,
            )  # fmt: skip
        else:
            launch(
                _kernel("selective_step_kernel"), (per_head, batch, 1), *pointers,
                size, low, high, warps=blocks.warps, chain=chain,
                HAS_D=D is not None, **flags, N=n, BLOCK_D=rows, **ends,
            )  # fmt: skip
    return y, new, squares
