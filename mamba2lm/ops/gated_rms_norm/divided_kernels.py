"""Triton kernels of the gated norm whose groups of channels are divided over processes.

    u = x silu(z);    y = u r weight,   r = (Σ u² / all channels of the group + eps)^(-1/2)

Two sums reach over processes, that of u² forwards and that of dy weight u backwards. So each pass
is cut in two: ``sums_kernel`` adds up what this process has, and once the sum is whole the other
two finish. Everything is computed in float32.

Letters: t rows (all leading axes), k runs of channels that lie in one group each, c channels.
``x_t`` and the like are the strides of rows, divided by ``UNIT``, as in ``forward.py``.
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_run(base_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load a run of channels in float32, with zeros behind it."""
    c = tl.arange(0, BLOCK)
    return tl.load(base_ptr + c, mask=c < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_run(base_ptr, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a run of channels in the pointer's dtype."""
    c = tl.arange(0, BLOCK)
    tl.store(base_ptr + c, value.to(base_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def sums_kernel(
    x_ptr, z_ptr, dy_ptr, weight_ptr, sums_ptr, x_t, z_t, dy_t,
    BACKWARD: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Add up u², or dy weight u, over one run of one row."""
    t = tl.cast(tl.program_id(0), tl.int64)
    k = tl.program_id(1)
    x = load_run(x_ptr + t * (x_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
    z = load_run(z_ptr + t * (z_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
    u = x * z * tl.sigmoid(z)
    if BACKWARD:
        dy = load_run(dy_ptr + t * (dy_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
        u *= dy * load_run(weight_ptr + k * WIDTH, WIDTH, BLOCK)
    else:
        u *= u
    tl.store(sums_ptr + t * RUNS + k, tl.sum(u, axis=0))


@triton.jit
def normalise_kernel(
    x_ptr, z_ptr, weight_ptr, scale_ptr, y_ptr, x_t, z_t,
    RUNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute y for one run of one row."""
    t = tl.cast(tl.program_id(0), tl.int64)
    k = tl.program_id(1)
    x = load_run(x_ptr + t * (x_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
    z = load_run(z_ptr + t * (z_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
    weight = load_run(weight_ptr + k * WIDTH, WIDTH, BLOCK)
    y = x * z * tl.sigmoid(z) * (tl.load(scale_ptr + t * RUNS + k) * weight)
    store_run(y_ptr + (t * RUNS + k) * WIDTH, y, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["t_size", "steps"])
def gradients_kernel(
    x_ptr, z_ptr, dy_ptr, weight_ptr, scale_ptr, slope_ptr, dx_ptr, dz_ptr, y_ptr, partial_ptr,
    x_t, z_t, dy_t, dz_t, t_size, steps,
    WANT_Y: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one run of ``steps`` rows, and their part of the weight's.

    With s = Σ dy weight u over the whole group, du = r weight dy - slope u, slope = r³ s / width.
    y may be stored once more, for a layer that did not keep it.
    """
    k = tl.program_id(1)
    first = tl.cast(tl.program_id(0), tl.int64) * steps
    weight = load_run(weight_ptr + k * WIDTH, WIDTH, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for t in tl.range(first, tl.minimum(first + steps, t_size), num_stages=STAGES):
        x = load_run(x_ptr + t * (x_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
        z = load_run(z_ptr + t * (z_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
        dy = load_run(dy_ptr + t * (dy_t * UNIT) + k * WIDTH, WIDTH, BLOCK)
        scale = tl.load(scale_ptr + t * RUNS + k)
        slope = tl.load(slope_ptr + t * RUNS + k)
        gate = tl.sigmoid(z)
        u = x * z * gate
        scaled = u * scale
        dweight += dy * scaled
        du = dy * weight * scale - slope * u
        out = (t * RUNS + k) * WIDTH
        store_run(dx_ptr + out, du * z * gate, WIDTH, BLOCK)
        if WANT_Y:  # to the last bit what the forward pass gave: a layer may keep that instead
            store_run(y_ptr + out, u * (scale * weight), WIDTH, BLOCK)
        dz_base = dz_ptr + t * (dz_t * UNIT) + k * WIDTH
        store_run(dz_base, du * x * gate * (1.0 + z * (1.0 - gate)), WIDTH, BLOCK)
    store_run(partial_ptr + (tl.program_id(0) * RUNS + k) * WIDTH, dweight, WIDTH, BLOCK)
