"""Launch the SSD's Triton kernels, as PyTorch custom operators with gradients.

Triton itself is imported on the first launch, so that this module imports everywhere. How a kernel
is launched is chosen in ``config.py``.

Letters: b batch, l length, h heads, p head dim, g groups, n state, c chunks, q position in chunk.
"""

from __future__ import annotations

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
    limits: tuple[bool, float, float],
) -> tuple[Tensor, Tensor]:
    """Return Δ and the cumulative log₂ decay per chunk, (b, h, padded length), float32."""
    b, length, h = dt.shape
    c = -(-length // q)
    delta = torch.empty(b, h, c * q, dtype=torch.float32, device=dt.device)
    cum = torch.empty_like(delta)
    launch(
        _kernels("forward").steps_kernel, (c, b, -(-h // STEP_HEADS)),
        dt, delta if dt_bias is None else dt_bias, A, delta, cum,
        *dt.stride(), length, h, c, limits[1], limits[2],
        HAS_BIAS=dt_bias is not None, SOFTPLUS=limits[0], CLAMP=limit_binds(*limits),
        Q=q, HEAD_BLOCK=STEP_HEADS, warps=4,
    )  # fmt: skip
    return delta, cum


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
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the chunks and, if dy is given, the gradients of those leaving.

    Both are (b, c, h, p, n) in the dtype of x, or float32 in a backward pass over few chunks.
    """
    b, length, h, p = x.shape
    n = B.shape[3]
    c = cum.shape[2] // q
    backward = dy is not None
    dy = x if dy is None else dy
    dtype = torch.float32 if backward and c <= FEW_CHUNKS else x.dtype
    states = torch.empty(b, c, h, p, n, dtype=dtype, device=x.device)
    dstates = torch.empty_like(states) if backward else states
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
    return states, dstates


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
    kernels = _kernels("forward")

    b, length, h, p = x.shape
    g, n = B.shape[2:]
    config = config_for(x, n)
    q = config.forward_chunk
    c = -(-length // q)
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    initial = None if initial_states is None else initial_states.contiguous()
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
    launch = Launches(
        x.device, "ssd_forward", config, document is None, dt_softplus, low, high,
        *(signature(tensor) for tensor in inputs),
    )  # fmt: skip
    with on_device(x.device):
        y = torch.empty(b, length, h, p, dtype=x.dtype, device=x.device)
        pre = torch.empty_like(y) if z is not None else y.new_empty(0)
        final = torch.empty(b, h, p, n, dtype=torch.float32, device=x.device)
        padded = _padded_documents(document, c * q)
        delta, cum = _steps(launch, dt, dt_bias, A, q, (dt_softplus, low, high))
        # A pointer that the kernel does not follow must still be one.
        no = delta
        skip = no if D is None else D
        documents = no if padded is None else padded
        gate, before_gate = (x, y) if z is None else (z, pre)
        strides = (
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *gate.stride()[:3], *y.stride()[:3],
        )  # fmt: skip
        if config.fused is not None:
            blocks = config.fused
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
            return y, final, pre
        states, _ = _states(
            launch, config.states, config.precision, q,
            x, B, None, C, delta, cum, padded, initial, None, final, None,
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
    return y, final, pre


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
) -> Gradients:
    """Run the backward kernels.

    Args:
        dout: Gradient of y, (b, l, h, p).
        dfinal: Gradient of the final states, (b, h, p, n), or None for zero.
        pre: y before the gate, as ``forward`` returned it.
        dx_out: Where to write the gradient of x, (b, l, h, p) with unit stride on the last axis: a
            slice of a layer's fused gradient, for one. None allocates it.

    Other Args: as ``forward``.

    Returns:
        Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states; those of absent arguments
        are empty tensors.
    """
    kernels = _kernels("backward")

    b, length, h, p = x.shape
    g, n = B.shape[2:]
    config = config_for(x, n)
    q = config.chunk
    c = -(-length // q)
    x, B, C, dy = unit_stride(x), unit_stride(B), unit_stride(C), unit_stride(dout)
    z = None if z is None else unit_stride(z)
    device = x.device
    initial = None if initial_states is None else initial_states.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial, pre, dy, dfinal, dx_out)
    launch = Launches(
        device, "ssd_backward", config, document is None, dt_softplus, low, high,
        *(signature(tensor) for tensor in inputs),
    )  # fmt: skip
    with on_device(device):
        padded = _padded_documents(document, c * q)
        dx = dx_out
        if dx is None:
            dx = torch.empty(b, length, h, p, dtype=x.dtype, device=device)
        assert dx.shape == x.shape
        assert dx.stride(3) == 1
        dz = x.new_empty((0,) if z is None else (b, length, h, p))
        if z is not None:
            gated, dy = dy, torch.empty_like(dz)
            launch(
                kernels.gate_backward_kernel, (-(-length // 64), h, b),
                gated, pre, z, dy, dz,
                *gated.stride()[:3], *z.stride()[:3], *dy.stride()[:3], length,
                Q=64, P=p, warps=4,
            )  # fmt: skip
        limits = (dt_softplus, low, high)
        delta, cum = _steps(launch, dt, dt_bias, A, q, limits)
        dinitial = torch.empty(
            (0,) if initial is None else (b, h, p, n), dtype=torch.float32, device=device
        )
        states, dstates = _states(
            launch, config.states_backward, config.precision, q,
            x, B, dy, C, delta, cum, padded, initial, dfinal, None, dinitial,
        )  # fmt: skip

        through, within = config.through, config.within
        if states.dtype != x.dtype:
            through = within = Blocks(warps=8 if min(p, n) >= 64 else 4, stages=1, n=64)
        n_block = min(through.n, n)
        columns = n // n_block
        through_block = heads_per_program(h // g, 2 * columns * b * c * g, through.programs)
        within_block = heads_per_program(h // g, b * c * g, within.programs)
        within_splits = h // g // within_block
        splits = within_splits + h // g // through_block
        # Partial sums of dB and dC: those from inside the chunks, then those through states.
        sums = torch.empty(2, splits, b, length, g, n, dtype=torch.float32, device=device)
        # For every position: gradients of Δ and cum, x·dy, and those through the states.
        along = torch.empty(3 + 2 * columns, *cum.shape, dtype=torch.float32, device=device)
        ddelta, dcum, skips, dleave = along[0], along[1], along[2], along[3]
        denter = along[3 + columns]
        partials = torch.empty(3, b * c, h, dtype=torch.float32, device=device)
        no = delta
        documents = no if padded is None else padded
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
        ddt = torch.empty(b, length, h, dtype=dt.dtype, device=device)
        launch(
            kernels.steps_backward_kernel, (c, b, -(-h // STEP_HEADS)),
            dt, no if dt_bias is None else dt_bias, A, delta, ddelta, dcum, dleave, denter, skips,
            ddt, partials[0], partials[1], partials[2],
            *dt.stride(), length, h, c, delta.numel(), low, high,
            HAS_BIAS=dt_bias is not None, HAS_D=D is not None, SOFTPLUS=dt_softplus,
            CLAMP=limit_binds(*limits), Q=q, HEAD_BLOCK=STEP_HEADS, COLUMNS=columns, warps=4,
        )  # fmt: skip
        dB = torch.empty(b, length, g, n, dtype=B.dtype, device=device)
        dC = torch.empty_like(dB)
        launch(
            kernels.reduce_kernel, (-(-dB.numel() // 1024), 2, 1),
            sums, dB, dC, dC, dB.numel(), splits,
            SECOND=True, THIRD=False, BLOCK=1024, SPLIT_BLOCK=1, warps=4,
        )  # fmt: skip
        dA = torch.empty_like(A)
        dbias = A.new_empty(0) if dt_bias is None else torch.empty_like(dt_bias)
        dD = A.new_empty(0) if D is None else torch.empty_like(D)
        launch(
            kernels.reduce_kernel, (-(-h // 16), 3, 1),
            partials, dA, dbias, dD, h, b * c,
            SECOND=dt_bias is not None, THIRD=D is not None, BLOCK=16, SPLIT_BLOCK=128,
            warps=4, variant="_vectors",
        )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


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
