"""Launch the SSD's Triton kernels, as PyTorch custom operators with gradients.

Triton itself is imported on the first launch, so that this module imports everywhere. How a kernel
is launched is chosen in ``config.py``.

Letters: b batch, l length, h heads, p head dim, g groups, n state, c chunks, q position in chunk.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.discretisation import limit_binds
from mamba2lm.ops.kernels import Launches, on_device, signature, unit_stride
from mamba2lm.ops.scan_operator import Gradients, ScanOperator
from mamba2lm.ops.ssd.config import (
    HEAD_DIMS,
    LARGEST_FLOAT_STATE,
    STATES,
    Blocks,
    Config,
    choose_config,
    config_for,
    heads_per_program,
    override_config,
    reason_against,
    unsupported,
)

__all__ = [
    "HEAD_DIMS",
    "LARGEST_FLOAT_STATE",
    "STATES",
    "Blocks",
    "Config",
    "backward",
    "choose_config",
    "forward",
    "heads_per_program",
    "override_config",
    "reason_against",
    "ssd_triton",
    "unsupported",
]

# Heads that one program of the two kernels for step sizes treats side by side.
STEP_HEADS = 16

FEW_CHUNKS = 8
"""Up to here the backward pass keeps the states of chunks in float32. The gradient of A contains
the products <S, dS> of whole states, whose rounding only averages out over many chunks."""


Limits = tuple[bool, float, float]
"""Whether softplus is applied to dt + dt_bias, and the least and largest Δ."""


@lru_cache
def _kernels(module: str) -> Any:
    """Import a module of kernels, and Triton with the first."""
    return importlib.import_module(f"mamba2lm.ops.ssd.{module}")


def _padded_documents(document_bl: Tensor | None, padded: int) -> Tensor | None:
    if document_bl is None:
        return None
    if document_bl.shape[1] == padded and document_bl.dtype == torch.int32:
        return document_bl.contiguous()
    tail_bl = document_bl[:, -1:].expand(-1, padded - document_bl.shape[1])
    return torch.cat([document_bl, tail_bl], dim=1).to(torch.int32)


def _steps(
    launch: Launches,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    q: int,
    limits: Limits,
    delta: Tensor,
    cum: Tensor,
) -> None:
    """Write Δ and the cumulative log₂ decay per chunk, (b, h, padded length), float32."""
    b, length, h = dt.shape
    c = -(-length // q)
    launch(
        _kernels("forward").steps_kernel, (c, b, -(-h // STEP_HEADS)),
        dt, delta if dt_bias is None else dt_bias, A, delta, cum,
        *dt.stride(), length, h, c, limits[1], limits[2],
        HAS_BIAS=dt_bias is not None, SOFTPLUS=limits[0], CLAMP=limit_binds(*limits),
        Q=q, HEAD_BLOCK=STEP_HEADS, warps=4,
    )  # fmt: skip


def _states(
    launch: Launches,
    blocks: Blocks,
    precision: str,
    q: int,
    x: Tensor,
    B: Tensor,
    dy: Tensor | None,
    C: Tensor,
    delta: Tensor,
    cum: Tensor,
    document: Tensor | None,
    initial: Tensor | None,
    dfinal: Tensor | None,
    final: Tensor | None,
    dinitial: Tensor | None,
    states: Tensor,
    dstates: Tensor,
) -> None:
    """Write the states that enter the chunks and, if dy is given, the gradients of those leaving.

    Both are (b, c, h, p, n).
    """
    b, length, h, p = x.shape
    n = B.shape[3]
    c = cum.shape[2] // q
    backward = dy is not None
    dy = x if dy is None else dy
    p_block, n_block = min(blocks.p, p), min(blocks.n, n)
    no = delta
    launch(
        _kernels("forward").states_kernel,
        (b * h * (p // p_block) * (n // n_block), 2 if backward else 1, 1),
        x, B, dy, C, delta, cum, no if document is None else document,
        no if initial is None else initial, no if dfinal is None else dfinal, states, dstates,
        no if final is None else final, no if dinitial is None else dinitial,
        *x.stride()[:3], *B.stride()[:3], *dy.stride()[:3], *C.stride()[:3],
        length, h, c, h // B.shape[2],
        BACKWARD=backward, HAS_DOCUMENTS=document is not None, HAS_INITIAL=initial is not None,
        HAS_DFINAL=dfinal is not None,
        Q=q, P=p, N=n, P_BLOCK=p_block, N_BLOCK=n_block, DIRECT=blocks.direct,
        PRECISION=precision,
        warps=blocks.warps, stages=blocks.stages,
    )  # fmt: skip


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    document: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        x: Inputs, (b, l, h, p).
        dt: Raw step sizes, (b, l, h).
        A: Decay rates, (h,).
        B: Input maps, (b, l, g, n), in the dtype of x.
        C: Output maps, (b, l, g, n), in the dtype of x.
        D: Skip weights, (h,), or None.
        z: Gate, (b, l, h, p), or None.
        dt_bias: (h,) or None.
        initial_states: (b, h, p, n) or None.
        document: Document ordinals, (b, l), or None.
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        low: Smallest Δ.
        high: Largest Δ.

    Returns:
        y (b, l, h, p); the final states (b, h, p, n), float32; and for the backward pass y before
        the gate, empty without one.
    """
    b, length, h, p = x.shape
    n = B.shape[3]
    config = config_for(x, n)
    q = config.forward_chunk
    c = -(-length // q)
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    initial = None if initial_states is None else initial_states.contiguous()
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
    limits = dt_softplus, low, high
    with on_device(x.device):
        padded = _padded_documents(document, c * q)
        launch = Launches(
            x.device, "ssd_forward", config, limits, signature(padded), *map(signature, inputs)
        )
        y = torch.empty(b, length, h, p, dtype=x.dtype, device=x.device)
        pre = torch.empty_like(y) if z is not None else y.new_empty(0)
        final = torch.empty(b, h, p, n, dtype=torch.float32, device=x.device)
        steps = torch.empty(2, b, h, c * q, dtype=torch.float32, device=x.device)
        states = None
        if config.fused is None:
            states = torch.empty(b, c, h, p, n, dtype=x.dtype, device=x.device)
        launch.run(_launch_forward, (*inputs, padded, y, pre, final, steps, states), config, limits)
    return y, final, pre


def _launch_forward(
    launch: Launches,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    padded: Tensor | None,
    y: Tensor,
    pre: Tensor,
    final: Tensor,
    steps: Tensor,
    states: Tensor | None,
    config: Config,
    limits: Limits,
) -> None:
    kernels = _kernels("forward")
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    q = config.forward_chunk
    c = -(-length // q)
    delta, cum = steps[0], steps[1]
    _steps(launch, dt, dt_bias, A, q, limits, delta, cum)
    # A pointer that the kernel does not follow must still be one.
    no = delta
    skip = no if D is None else D
    documents = no if padded is None else padded
    gate, before_gate = (x, y) if z is None else (z, pre)
    strides = (
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *gate.stride()[:3], *y.stride()[:3],
    )  # fmt: skip
    if states is None:
        blocks = config.fused
        assert blocks is not None
        p_block = min(blocks.p, p)
        launch(
            kernels.fused_kernel, (b * h * (p // p_block), 1, 1),
            x, B, C, gate, delta, cum, skip, documents, no if initial is None else initial,
            y, before_gate, final, *strides, length, h, c, h // g,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_DOCUMENTS=padded is not None,
            HAS_INITIAL=initial is not None, Q=q, P=p, N=n, P_BLOCK=p_block,
            DIRECT=blocks.direct, PRECISION=config.precision,
            warps=blocks.warps, stages=blocks.stages,
        )  # fmt: skip
        return
    _states(
        launch, config.states, config.precision, q,
        x, B, None, C, delta, cum, padded, initial, None, final, None, states, states,
    )  # fmt: skip
    blocks = config.scan
    head_block = heads_per_program(h // g, b * c * g, blocks.programs)
    launch(
        kernels.scan_kernel, (h // head_block, c, b),
        x, B, C, gate, delta, cum, skip, documents, states, y, before_gate,
        *strides, length, h, c, h // g, head_block,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_DOCUMENTS=padded is not None,
        Q=q, P=p, N=n, PRECISION=config.precision, STAGES=blocks.stages,
        warps=blocks.warps, stages=blocks.stages,
    )  # fmt: skip


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    document: Tensor | None,
    pre: Tensor,
    dt_softplus: bool,
    low: float,
    high: float,
    dx_out: Tensor | None = None,
    ddt_out: Tensor | None = None,
    dB_out: Tensor | None = None,
    dC_out: Tensor | None = None,
) -> Gradients:
    """Run the backward kernels.

    Args:
        dout: Gradient of y, (b, l, h, p).
        dfinal: Gradient of the final states, (b, h, p, n), or None for zero.
        pre: y before the gate, as ``forward`` returned it.
        dx_out: Where to write the gradient of x, (b, l, h, p) with unit stride on the last axis: a
            slice of a layer's fused gradient, for one. None allocates it.
        ddt_out: The same for dt, (b, l, h): rows (h) lie at even distances.
        dB_out: The same for B, (b, l, g, n): rows (g, n) are contiguous and lie at even distances.
        dC_out: The same for C, with the strides of ``dB_out``.

    Other Args: as ``forward``.

    Returns:
        Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states; those of absent arguments
        are empty tensors.
    """
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    config = config_for(x, n)
    q = config.chunk
    c = -(-length // q)
    x, B, C, dout = unit_stride(x), unit_stride(B), unit_stride(C), unit_stride(dout)
    z = None if z is None else unit_stride(z)
    device = x.device
    initial = None if initial_states is None else initial_states.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial, pre, dout, dfinal)
    limits = dt_softplus, low, high
    few = c <= FEW_CHUNKS and x.dtype != torch.float32
    config = _with_float_states(config, min(p, n)) if few else config
    through_block, within_block = _head_blocks(config, h // g, b * c * g, n)
    columns = n // min(config.through.n, n)
    splits = h // g // within_block + h // g // through_block
    with on_device(device):
        padded = _padded_documents(document, c * q)
        launch = Launches(
            device, "ssd_backward", config, limits, signature(padded),
            *map(signature, (dx_out, ddt_out, dB_out, dC_out)), *map(signature, inputs),
        )  # fmt: skip
        dx = dx_out
        if dx is None:
            dx = torch.empty(b, length, h, p, dtype=x.dtype, device=device)
        assert dx.shape == x.shape
        assert dx.stride(3) == 1
        dz = x.new_empty((0,) if z is None else (b, length, h, p))
        dy = dout if z is None else torch.empty_like(dz)
        dinitial = torch.empty(
            (0,) if initial is None else (b, h, p, n), dtype=torch.float32, device=device
        )
        states = torch.empty(b, c, h, p, n, dtype=torch.float32 if few else x.dtype, device=device)
        dstates = torch.empty_like(states)
        # Partial sums of dB and dC: those from inside the chunks, then those through states.
        sums = torch.empty(2, splits, b, length, g, n, dtype=torch.float32, device=device)
        # For every position: Δ and cum, gradients of both, x·dy, and those through the states.
        along = torch.empty(5 + 2 * columns, b, h, c * q, dtype=torch.float32, device=device)
        partials = torch.empty(3, b * c, h, dtype=torch.float32, device=device)
        ddt = _rows_out(ddt_out, (b, length, h), dt)
        dB = _rows_out(dB_out, (b, length, g, n), B)
        dC = _rows_out(dC_out, (b, length, g, n), B)
        assert dC.stride() == dB.stride()
        dA = torch.empty_like(A)
        dbias = A.new_empty(0) if dt_bias is None else torch.empty_like(dt_bias)
        dD = A.new_empty(0) if D is None else torch.empty_like(D)
        launch.run(
            _launch_backward,
            (
                *inputs, padded, dx, dy, dz, dinitial, states, dstates, sums, along, partials,
                ddt, dB, dC, dA, dbias, dD,
            ),
            config, limits, (through_block, within_block),
        )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _rows_out(given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor (b, l, …) to write to: new, or as given, whose rows lie at even distances."""
    if given is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    assert given.shape == shape
    assert given.dtype == like.dtype
    assert given.stride(0) == shape[1] * given.stride(1) or shape[0] == 1
    assert given.stride()[2:] == (*shape[3:], 1)
    return given


@lru_cache
def _with_float_states(config: Config, smaller: int) -> Config:
    """Return how the backward pass is launched where states are float32 beside a half dtype.

    Args:
        config: How it is otherwise.
        smaller: The smaller side of a state.
    """
    blocks = Blocks(warps=8 if smaller >= 64 else 4, stages=1, n=64)
    return dataclasses.replace(config, through=blocks, within=blocks)


@lru_cache(maxsize=4096)
def _head_blocks(config: Config, heads_per_group: int, rows: int, n: int) -> tuple[int, int]:
    """Return how many heads a program of ``through`` and of ``within`` treats."""
    columns = n // min(config.through.n, n)
    return (
        heads_per_program(heads_per_group, 2 * columns * rows, config.through.programs),
        heads_per_program(heads_per_group, rows, config.within.programs),
    )


def _launch_backward(
    launch: Launches,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    pre: Tensor,
    dout: Tensor,
    dfinal: Tensor | None,
    padded: Tensor | None,
    dx: Tensor,
    dy: Tensor,
    dz: Tensor,
    dinitial: Tensor,
    states: Tensor,
    dstates: Tensor,
    sums: Tensor,
    along: Tensor,
    partials: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
    dA: Tensor,
    dbias: Tensor,
    dD: Tensor,
    config: Config,
    limits: Limits,
    head_blocks: tuple[int, int],
) -> None:
    kernels = _kernels("backward")
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    q = config.chunk
    c = -(-length // q)
    through, within = config.through, config.within
    through_block, within_block = head_blocks
    within_splits = h // g // within_block
    n_block = min(through.n, n)
    columns = n // n_block
    delta, cum, ddelta, dcum, skips = along[:5]
    dleave, denter = along[5], along[5 + columns]
    no = delta
    documents = no if padded is None else padded
    if z is not None:
        launch(
            kernels.gate_backward_kernel, (-(-length // 64), h, b),
            dout, pre, z, dy, dz,
            *dout.stride()[:3], *z.stride()[:3], *dy.stride()[:3], length,
            Q=64, P=p, warps=4,
        )  # fmt: skip
    _steps(launch, dt, dt_bias, A, q, limits, delta, cum)
    _states(
        launch, config.states_backward, config.precision, q,
        x, B, dy, C, delta, cum, padded, initial, dfinal, None, dinitial, states, dstates,
    )  # fmt: skip
    shape = (length, h, g, c, h // g)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3])
    launch(
        kernels.through_states_kernel, (2 * columns * (h // through_block), c, b),
        x, B, C, dy, delta, cum, documents, states, dstates,
        sums[0, within_splits], sums[1, within_splits], denter, dleave,
        *strides, *shape, through_block, b,
        HAS_DOCUMENTS=padded is not None, Q=q, P=p, N=n, N_BLOCK=n_block,
        PRECISION=config.precision, STAGES=through.stages,
        warps=through.warps, stages=through.stages,
    )  # fmt: skip
    launch(
        kernels.within_kernel, (h // within_block, c, b),
        x, B, C, dy, delta, cum, no if D is None else D, documents, dstates,
        dx, sums[0], sums[1], ddelta, dcum, skips,
        *strides, *dx.stride()[:3], *shape, within_block, b,
        HAS_D=D is not None, HAS_DOCUMENTS=padded is not None, Q=q, P=p, N=n,
        PRECISION=config.precision, STAGES=within.stages,
        warps=within.warps, stages=within.stages,
    )  # fmt: skip
    launch(
        kernels.steps_backward_kernel, (c, b, -(-h // STEP_HEADS)),
        dt, no if dt_bias is None else dt_bias, A, delta, ddelta, dcum, dleave, denter, skips,
        ddt, partials[0], partials[1], partials[2],
        *dt.stride(), ddt.stride(1), length, h, c, delta.numel(), *limits[1:],
        HAS_BIAS=dt_bias is not None, HAS_D=D is not None, SOFTPLUS=limits[0],
        CLAMP=limit_binds(*limits), Q=q, HEAD_BLOCK=STEP_HEADS, COLUMNS=columns, warps=4,
    )  # fmt: skip
    launch(
        kernels.reduce_kernel, (-(-dB.numel() // 1024), 2, 1),
        sums, dB, dC, dC, dB.numel(), sums.shape[1], dB.stride(1),
        SECOND=True, THIRD=False, WIDTH=g * n, BLOCK=1024, SPLIT_BLOCK=1, warps=4,
    )  # fmt: skip
    launch(
        kernels.reduce_kernel, (-(-h // 16), 3, 1),
        partials, dA, dbias, dD, h, b * c, 1,
        SECOND=dt_bias is not None, THIRD=D is not None, WIDTH=1, BLOCK=16, SPLIT_BLOCK=128,
        warps=4, variant="_vectors",
    )  # fmt: skip


def _fake_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, p = x.shape[0], x.shape[2], x.shape[3]
    y = x.new_empty(x.shape)
    pre = x.new_empty(0) if z is None else torch.empty_like(y)
    return y, x.new_empty(b, h, p, B.shape[3], dtype=torch.float32), pre


_operator = ScanOperator("ssd", forward, _fake_forward, backward)
forward_op, backward_op = _operator.forward_op, _operator.backward_op


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the SSD with the Triton kernels; differentiable once in every tensor.

    Args:
        x: Inputs, (b, l, h, p), any strides; bfloat16, float16 or float32.
        dt: Raw step sizes, (b, l, h).
        A: Decay rates, (h,).
        B: Input maps, (b, l, g, n).
        C: Output maps, (b, l, g, n).
        D: Skip weights, (h,), or None.
        z: Gate, (b, l, h, p), or None.
        dt_bias: Bias of the step sizes, (h,), or None.
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Smallest and largest Δ.
        initial_states: State before position 0, (b, h, p, n), or None.
        document: Document ordinals, (b, l), or None.

    Returns:
        y (b, l, h, p) in the dtype of x and the final states (b, h, p, n) in float32.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 6.
    """
    arguments = (
        x,
        dt,
        A.contiguous(),
        B.to(x.dtype),
        C.to(x.dtype),
        None if D is None else D.contiguous(),
        z,
        None if dt_bias is None else dt_bias.contiguous(),
        initial_states,
        document,
        dt_softplus,
        float(dt_limit[0]),
        float(dt_limit[1]),
    )
    return _operator(*arguments)
