"""Triton kernels of the selective scan's forward pass (and what the backward pass shares).

Every channel is an SSM of its own, so a thread takes a channel and walks through time with its n
states in registers:

    h_t = 2^(Δ_t A log₂e) h_{t-1} + Δ_t x_t B_t,   y_t = (h_t · C_t + D x_t) silu(z_t)

``scan_kernel`` computes this over a *segment* of the sequence from the state that enters it. With
many channels one segment spans the whole sequence (the sequential schedule). With few, segments are
computed at once: ``ends_kernel`` first finds what each adds to the state, and ``pass_kernel``
passes states across segments. A segment multiplies its entering state by 2^(A log₂e ΣΔ), so the sum
of its step sizes is all that has to be known of its decays.

For the backward pass ``scan_kernel`` leaves the state before every chunk of q positions. A document
boundary adds -∞ to the exponent of its first position: the decay is exactly 0.

Letters: b batch, l length, d channels, n state, s segments, c chunks. ``…_l`` and the like name the
stride of that axis.

    name      shape         what
    restart   (b, l)        uint8, 1 where a document begins
    ends      (b, s, d, n)  what a segment adds to the state, then the state that enters it, float32
    span      (b, s, d)     Σ Δ over a segment, float32
    broken    (b, s)        0, or -∞ if a document begins inside the segment, float32
    states    (b, c, n, d)  state before each chunk, float32
"""

# Triton compiles the bodies below; the types of Python are not the types of its language.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005 (that language has no unpacking in tuples)

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(v):
    """log(1 + eᵛ) with full relative precision for very negative v.

    log(1 + u) / u is a polynomial fitted on [0, 1], good to 5e-9 (the GPU's own logarithm has an
    absolute error near 1).
    """
    u = tl.exp2(-tl.abs(v) * LOG2_E)
    p = u * -0.0032439809292554855 + 0.019851263612508774
    p = p * u - 0.056959159672260284
    p = p * u + 0.10603617131710052
    p = p * u - 0.15305569767951965
    p = p * u + 0.19675931334495544
    p = p * u - 0.24954132735729218
    p = p * u + 0.3332996368408203
    p = p * u - 0.4999990165233612
    p = p * u + 1.0
    return tl.maximum(v, 0.0) + p * u


@triton.jit
def step_size(v, low, high, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """Δ from a raw step size that its bias was added to."""
    if SOFTPLUS:
        v = softplus(v)
    if CLAMP:
        v = tl.minimum(tl.maximum(v, low), high)
    return v


@triton.jit
def sigmoid(v):
    """1 / (1 + e⁻ᵛ); a squared reciprocal root is cheaper than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(-v * LOG2_E))
    return root * root


@triton.jit
def load_rows(x_ptrs, X_L: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT positions of a block of channels, one tensor each."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x_ptrs + i * X_L),)
    return rows


@triton.jit
def load_words(ptr, state_size, N: tl.constexpr, EVEN_N: tl.constexpr, PACKED: tl.constexpr):
    """Load one position of B or C for ``states_of``.

    PACKED: N is even and pairs of bfloat16 states are aligned words. Taken apart by a shift and a
    mask they are float32; the compiler would spend another instruction on every second one.
    """
    n = tl.arange(0, N)
    if PACKED:
        words = tl.load(ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, N // 2))
    elif EVEN_N:
        words = tl.load(ptr + n)
    else:
        words = tl.load(ptr + n, mask=n < state_size, other=0.0)
    return words


@triton.jit
def states_of(words, PACKED: tl.constexpr):
    """Return what ``load_words`` loaded as float32."""
    if PACKED:
        low = (words << 16).to(tl.float32, bitcast=True)
        states = tl.interleave(low, (words & -65536).to(tl.float32, bitcast=True))
    else:
        states = words.to(tl.float32)
    return states


@triton.jit
def load_states(ptr, state_size, N: tl.constexpr, EVEN_N: tl.constexpr, PACKED: tl.constexpr):
    """Load one position of B or C as float32, the states past the last as 0."""
    return states_of(load_words(ptr, state_size, N, EVEN_N, PACKED), PACKED)


@triton.jit
def scan_steps(
    h, A, D, bias, x_ptrs, dt_ptrs, z_ptrs, B_ptr, C_ptr, restart_ptr, y_ptrs,
    real_d, state_size, low, high,
    X_L: tl.constexpr, DT_L: tl.constexpr, B_L: tl.constexpr, C_L: tl.constexpr, Z_L: tl.constexpr,
    Y_L: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, HAS_RESTARTS: tl.constexpr, EVEN_N: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Take STEPS positions, writing their outputs, and return the state after them."""
    # All loads come before the first store: the compiler may not move one across the other.
    xs = load_rows(x_ptrs, X_L, STEPS)
    dts = load_rows(dt_ptrs, DT_L, STEPS)
    if HAS_Z:
        zs = load_rows(z_ptrs, Z_L, STEPS)
    ys = ()
    for i in tl.static_range(STEPS):
        x = xs[i].to(tl.float32)
        delta = step_size(dts[i].to(tl.float32) + bias, low, high, SOFTPLUS, CLAMP)
        exponent = A * delta[:, None]
        if HAS_RESTARTS:
            exponent += tl.where(tl.load(restart_ptr + i) != 0, float("-inf"), 0.0)
        B = load_states(B_ptr + i * B_L, state_size, N, EVEN_N, PACKED)
        C = load_states(C_ptr + i * C_L, state_size, N, EVEN_N, PACKED)
        h = h * tl.exp2(exponent) + (delta * x)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], axis=1)
        if HAS_D:
            y += D * x
        if HAS_Z:
            z = zs[i].to(tl.float32)
            y *= z * sigmoid(z)
        ys = ys + (y.to(y_ptrs.dtype.element_ty),)
    for i in tl.static_range(STEPS):
        tl.store(y_ptrs + i * Y_L, ys[i], mask=real_d)
    return h


@triton.jit(do_not_specialize=["one"])
def scan_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, restart_ptr, enter_ptr,
    y_ptr, states_ptr, final_ptr,
    x_b, dt_b, B_b, C_b, z_b, enter_b, enter_s, enter_d, enter_n,
    length, channels, state_size, segment, chunks, one, low, high,
    X_L: tl.constexpr, DT_L: tl.constexpr, B_L: tl.constexpr, C_L: tl.constexpr, Z_L: tl.constexpr,
    Y_L: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, HAS_RESTARTS: tl.constexpr, HAS_ENTER: tl.constexpr, SAVE: tl.constexpr,
    EVEN_N: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr, N: tl.constexpr,
    D_BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Walk one segment of a block of channels; with SAVE, store the state before each chunk.

    ``one`` is 1. The compiler, which does not know, takes n for strided and so leaves it whole to
    each thread instead of spreading it over several for the sake of wider loads.
    """
    s = tl.program_id(1)
    b = tl.cast(tl.program_id(2), tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N)
    real_d = d < channels
    # Channels past the last load those of the last and store nothing.
    near_d = tl.minimum(d, channels - 1)
    real_n = n < (N if EVEN_N else state_size)
    real = real_d[:, None] & real_n[None, :]
    A = tl.load(
        A_ptr + (near_d[:, None] * state_size + n[None, :] * one), mask=real_n[None, :], other=0.0
    )
    A = A.to(tl.float32) * LOG2_E
    if HAS_ENTER:
        enter = enter_ptr + b * enter_b + tl.cast(s, tl.int64) * enter_s
        enter += near_d[:, None] * enter_d + n[None, :] * (enter_n * one)
        h = tl.load(enter, mask=real_n[None, :], other=0.0).to(tl.float32)
    else:
        h = tl.zeros((D_BLOCK, N), tl.float32)
    D = tl.load(D_ptr + near_d).to(tl.float32) if HAS_D else 0.0
    bias = tl.load(bias_ptr + near_d).to(tl.float32) if HAS_BIAS else 0.0
    begin = s * segment
    end = tl.minimum(begin + segment, length)
    wide = tl.cast(begin, tl.int64)
    x_ptrs = x_ptr + b * x_b + wide * X_L + near_d
    dt_ptrs = dt_ptr + b * dt_b + wide * DT_L + near_d
    z_ptrs = z_ptr + b * z_b + wide * Z_L + near_d
    y_ptrs = y_ptr + (b * length + wide) * channels + d
    B_ptr += b * B_b + wide * B_L
    C_ptr += b * C_b + wide * C_L
    restart_ptr += b * length + wide
    states_ptr += (b * chunks + begin // Q) * state_size * channels
    whole = begin + (end - begin) // STEPS * STEPS
    for start in range(begin, whole, STEPS):
        if SAVE and start % Q == 0:
            tl.store(states_ptr + d[:, None] * one + n[None, :] * Y_L, h, mask=real)
            states_ptr += tl.cast(state_size, tl.int64) * channels
        h = scan_steps(
            h, A, D, bias, x_ptrs, dt_ptrs, z_ptrs, B_ptr, C_ptr, restart_ptr, y_ptrs,
            real_d, state_size, low, high, X_L, DT_L, B_L, C_L, Z_L, Y_L,
            HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, CLAMP, HAS_RESTARTS,
            EVEN_N, PACKED, N, STEPS,
        )  # fmt: skip
        x_ptrs += STEPS * X_L
        dt_ptrs += STEPS * DT_L
        z_ptrs += STEPS * Z_L
        y_ptrs += STEPS * Y_L
        B_ptr += STEPS * B_L
        C_ptr += STEPS * C_L
        restart_ptr += STEPS
    for start in range(whole, end):
        if SAVE and start % Q == 0:
            tl.store(states_ptr + d[:, None] * one + n[None, :] * Y_L, h, mask=real)
        h = scan_steps(
            h, A, D, bias, x_ptrs, dt_ptrs, z_ptrs, B_ptr, C_ptr, restart_ptr, y_ptrs,
            real_d, state_size, low, high, X_L, DT_L, B_L, C_L, Z_L, Y_L,
            HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, CLAMP, HAS_RESTARTS,
            EVEN_N, PACKED, N, 1,
        )  # fmt: skip
        x_ptrs += X_L
        dt_ptrs += DT_L
        z_ptrs += Z_L
        y_ptrs += Y_L
        B_ptr += B_L
        C_ptr += C_L
        restart_ptr += 1
    if end == length:
        final_ptrs = final_ptr + b * channels * state_size
        final_ptrs += d[:, None] * state_size + n[None, :] * one
        tl.store(final_ptrs, h, mask=real)


@triton.jit
def end_steps(
    h, span, broken, A, bias, value_ptrs, dt_ptrs, z_ptrs, key_ptr, restart_ptr,
    state_size, low, high,
    VALUE_L: tl.constexpr, DT_L: tl.constexpr, KEY_L: tl.constexpr, Z_L: tl.constexpr,
    REVERSE: tl.constexpr, HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    HAS_RESTARTS: tl.constexpr, EVEN_N: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Take STEPS positions for the state alone."""
    values = load_rows(value_ptrs, VALUE_L, STEPS)
    dts = load_rows(dt_ptrs, DT_L, STEPS)
    if HAS_Z:
        zs = load_rows(z_ptrs, Z_L, STEPS)
    for i in tl.static_range(STEPS):
        value = values[i].to(tl.float32)
        delta = step_size(dts[i].to(tl.float32) + bias, low, high, SOFTPLUS, CLAMP)
        exponent = A * delta[:, None]
        if HAS_RESTARTS:
            reset = tl.where(tl.load(restart_ptr + (-i if REVERSE else i)) != 0, float("-inf"), 0.0)
            exponent += reset
            broken += reset
        key = load_states(key_ptr + i * KEY_L, state_size, N, EVEN_N, PACKED)
        if REVERSE:
            if HAS_Z:
                z = zs[i].to(tl.float32)
                value *= z * sigmoid(z)
            h = (h + value[:, None] * key[None, :]) * tl.exp2(exponent)
        else:
            h = h * tl.exp2(exponent) + (delta * value)[:, None] * key[None, :]
        span += delta
    return h, span, broken


@triton.jit(do_not_specialize=["one"])
def ends_kernel(
    value_ptr, dt_ptr, A_ptr, key_ptr, z_ptr, bias_ptr, restart_ptr,
    ends_ptr, span_ptr, broken_ptr,
    value_b, dt_b, key_b, z_b,
    length, channels, state_size, segment, segments, one, low, high,
    VALUE_L: tl.constexpr, DT_L: tl.constexpr, KEY_L: tl.constexpr, Z_L: tl.constexpr,
    REVERSE: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, HAS_RESTARTS: tl.constexpr, EVEN_N: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, D_BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Find what one segment adds to the state that leaves it, from values x and keys B.

    In reverse: what it adds to the gradient of the state that enters it, from values dy and keys C.
    The last segment of the walk is left out, for nothing comes after it. ``one``: see
    ``scan_kernel``.
    """
    s = tl.program_id(1) + (1 if REVERSE else 0)
    b = tl.cast(tl.program_id(2), tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N)
    real_d = d < channels
    near_d = tl.minimum(d, channels - 1)
    real_n = n < (N if EVEN_N else state_size)
    A = tl.load(
        A_ptr + (near_d[:, None] * state_size + n[None, :] * one), mask=real_n[None, :], other=0.0
    )
    A = A.to(tl.float32) * LOG2_E
    bias = tl.load(bias_ptr + near_d).to(tl.float32) if HAS_BIAS else 0.0
    begin = s * segment
    end = tl.minimum(begin + segment, length)
    wide = tl.cast(end - 1 if REVERSE else begin, tl.int64)
    value_ptrs = value_ptr + b * value_b + wide * VALUE_L + near_d
    dt_ptrs = dt_ptr + b * dt_b + wide * DT_L + near_d
    z_ptrs = z_ptr + b * z_b + wide * Z_L + near_d
    key_ptr += b * key_b + wide * KEY_L
    restart_ptr += b * length + wide
    WAY: tl.constexpr = -1 if REVERSE else 1
    h = tl.zeros((D_BLOCK, N), tl.float32)
    span = tl.zeros((D_BLOCK,), tl.float32)
    broken = 0.0
    whole = (end - begin) // STEPS
    for _ in range(0, whole):
        h, span, broken = end_steps(
            h, span, broken, A, bias, value_ptrs, dt_ptrs, z_ptrs, key_ptr, restart_ptr,
            state_size, low, high, VALUE_L * WAY, DT_L * WAY, KEY_L * WAY, Z_L * WAY,
            REVERSE, HAS_Z, SOFTPLUS, CLAMP, HAS_RESTARTS, EVEN_N, PACKED, N, STEPS,
        )  # fmt: skip
        value_ptrs += STEPS * WAY * VALUE_L
        dt_ptrs += STEPS * WAY * DT_L
        z_ptrs += STEPS * WAY * Z_L
        key_ptr += STEPS * WAY * KEY_L
        restart_ptr += STEPS * WAY
    for _ in range(whole * STEPS, end - begin):
        h, span, broken = end_steps(
            h, span, broken, A, bias, value_ptrs, dt_ptrs, z_ptrs, key_ptr, restart_ptr,
            state_size, low, high, VALUE_L * WAY, DT_L * WAY, KEY_L * WAY, Z_L * WAY,
            REVERSE, HAS_Z, SOFTPLUS, CLAMP, HAS_RESTARTS, EVEN_N, PACKED, N, 1,
        )  # fmt: skip
        value_ptrs += WAY * VALUE_L
        dt_ptrs += WAY * DT_L
        z_ptrs += WAY * Z_L
        key_ptr += WAY * KEY_L
        restart_ptr += WAY
    row = b * segments + s
    out = ends_ptr + row * channels * state_size
    tl.store(
        out + (d[:, None] * state_size + n[None, :] * one), h,
        mask=real_d[:, None] & real_n[None, :],
    )  # fmt: skip
    tl.store(span_ptr + row * channels + d, span, mask=real_d)
    if HAS_RESTARTS and tl.program_id(0) == 0:
        tl.store(broken_ptr + row, broken)


@triton.jit
def pass_kernel(
    ends_ptr, span_ptr, broken_ptr, A_ptr, enter_ptr, enter_b, enter_d, enter_n,
    channels, state_size, segments,
    REVERSE: tl.constexpr, HAS_RESTARTS: tl.constexpr, HAS_ENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace what each segment but the last adds to the state by the state that it starts from."""
    b = tl.cast(tl.program_id(1), tl.int64)
    size = channels * state_size
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < size
    d = i // state_size
    A = tl.load(A_ptr + i, mask=real, other=0.0).to(tl.float32) * LOG2_E
    if HAS_ENTER:
        enter = enter_ptr + b * enter_b + d * enter_d + (i % state_size) * enter_n
        state = tl.load(enter, mask=real, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, segments - 1):
        row = b * segments + (segments - 1 - k if REVERSE else k)
        added = tl.load(ends_ptr + row * size + i, mask=real, other=0.0)
        exponent = A * tl.load(span_ptr + row * channels + d, mask=real, other=0.0)
        if HAS_RESTARTS:
            exponent += tl.load(broken_ptr + row)
        tl.store(ends_ptr + row * size + i, state, mask=real)
        state = state * tl.exp2(exponent) + added
    last = b * segments + (0 if REVERSE else segments - 1)
    tl.store(ends_ptr + last * size + i, state, mask=real)
