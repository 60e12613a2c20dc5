"""The Triton kernels of the selective scan: on a GPU as they are, on a CPU in the interpreter."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import kernels, selective_scan
from mamba2lm.ops.selective_scan import launch
from mamba2lm.ops.selective_scan.launch import (
    Blocks,
    Config,
    choose_config,
    override_config,
    segment_length,
)

from .inputs import seq_idx
from .tolerances import NAIVE_ERROR_RATIO, relative_error

pytest.importorskip("triton")

FLOAT_LIMIT = 3e-5

runs_kernels = pytest.mark.skipif(
    not (kernels.INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"

SMALL = Blocks(channels=8, steps=4, alone=1)
SEQUENTIAL = Config(
    chunk=32, scan=SMALL, ends=SMALL, gradients=replace(SMALL, channels=16, programs=1)
)
SEGMENTS = Config(
    chunk=16,
    scan=replace(SMALL, steps=2, alone=1000, programs=1000),
    ends=SMALL,
    gradients=replace(SMALL, channels=4, steps=2, alone=1000, programs=1000),
    keep=False,
    blocks=1,
    segment=16,
    dot=False,
)


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    override_config(None)


def draw(b: int, length: int, d: int, n: int, *, decay: float = 1.0) -> dict[str, Tensor]:
    """Draw float32 inputs; B, C and z are slices of wider tensors, as a layer's are."""
    generator = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    _, B, C = randn(b, length, 16 + 2 * n).split([16, n, n], dim=-1)
    return {
        "x": randn(b, length, 2 * d)[..., :d],
        "dt": randn(b, length, d) - 1,
        "A": -decay * (0.1 + randn(d, n).abs()),
        "B": B,
        "C": C,
        "D": randn(d),
        "z": randn(b, length, 2 * d)[..., d:],
        "dt_bias": randn(d),
        "initial_states": randn(b, n, d).transpose(1, 2),
    }


def run(
    inputs: dict[str, Tensor], dtype: torch.dtype, impl: Any, weights: Any = None, **kwargs: Any
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Return outputs and every gradient, under a fixed random weighting of the outputs."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = ("A", "D", "dt_bias", "initial_states")
    leaves = {
        name: tensor.to(wide if name in kept else dtype).detach().requires_grad_()
        for name, tensor in inputs.items()
    }
    y, state = selective_scan(
        **leaves, dt_softplus=True, return_final_states=True, impl=impl, **kwargs
    )
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = tuple(torch.randn(o.shape, generator=generator).to(o.device) for o in (y, state))
    given = [w.to(o.dtype) for w, o in zip(weights, (y, state), strict=True)]
    found = torch.autograd.grad([y, state], list(leaves.values()), given)
    results = {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **results}, weights


def poison() -> None:
    """Fill free memory with NaN, so that what a kernel forgets to write shows."""
    blocks = [torch.full((1 << k,), math.nan, device=DEVICE) for k in range(8, 22)]
    del blocks


def check_float32(inputs: dict[str, Tensor], **kwargs: Any) -> None:
    exact, weights = run(inputs, torch.float64, "reference", **kwargs)
    poison()
    found, _ = run(inputs, torch.float32, "triton", weights, **kwargs)
    poison()
    # The interpreter takes seconds and cannot but repeat itself.
    again = (
        found if kernels.INTERPRETED else run(inputs, torch.float32, "triton", weights, **kwargs)[0]
    )
    for name, value in exact.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name
        assert torch.equal(found[name], again[name]), name


def ids(b: int, length: int) -> Tensor:
    return seq_idx(b, length).to(DEVICE)


@runs_kernels
@pytest.mark.parametrize(
    ("length", "config", "packed"),
    [
        (1, SEQUENTIAL, True),
        (63, SEQUENTIAL, True),
        (64, SEQUENTIAL, False),
        (1, SEGMENTS, False),
        (65, SEGMENTS, True),
        (127, SEGMENTS, False),
    ],
)
def test_float32_matches_the_reference(length: int, config: Config, packed: bool) -> None:
    override_config(config)
    batch = 2 if length == 1 else 1
    check_float32(draw(batch, length, 6, 3), seq_idx=ids(batch, length) if packed else None)


@runs_kernels
@pytest.mark.parametrize("n", [1, 16])
def test_state_sizes_match_the_reference(n: int) -> None:
    override_config(SEQUENTIAL)
    check_float32(draw(1, 9, 3, n), seq_idx=ids(1, 9))


@runs_kernels
@pytest.mark.parametrize("decay", [1e-6, 80.0])
def test_extreme_decays_match_the_reference(decay: float) -> None:
    override_config(SEGMENTS)
    check_float32(draw(1, 33, 4, 2, decay=decay), seq_idx=ids(1, 33))


@runs_kernels
def test_limits_on_the_step_match_the_reference() -> None:
    override_config(SEQUENTIAL)
    check_float32(draw(1, 20, 4, 2), dt_limit=(0.1, 1.0))


@runs_kernels
@pytest.mark.parametrize("config", [SEQUENTIAL, SEGMENTS])
@pytest.mark.parametrize("present", [(), ("D",), ("dt_bias",)])
def test_optional_arguments_may_be_absent(config: Config, present: tuple[str, ...]) -> None:
    override_config(config)
    inputs = draw(1, 35, 4, 2)
    for name in {"D", "z", "dt_bias", "initial_states"} - set(present):
        del inputs[name]
    check_float32(inputs)


@runs_kernels
def test_continuing_matches_the_whole() -> None:
    override_config(SEQUENTIAL)
    inputs = draw(1, 40, 4, 2)
    whole, final = selective_scan(**inputs, return_final_states=True, impl="triton")
    state, parts = inputs["initial_states"], []
    for part in (slice(0, 13), slice(13, 40)):
        cut = {k: v[:, part] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        y, state = selective_scan(
            **{**cut, "initial_states": state}, return_final_states=True, impl="triton"
        )
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-6
    assert relative_error(state, final) <= 1e-6


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-x", __file__]
    done = subprocess.run(
        [*command, "-k", "match or absent"], env=environment, capture_output=True, text=True,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "18 passed" in done.stdout.splitlines()[-1], done.stdout[-300:]


def check_half(inputs: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any) -> None:
    for name in ("x", "B", "C", "dt", "z"):
        inputs[name] = inputs[name].to(dtype)
    _, weights = run(inputs, torch.float64, "reference", **kwargs)
    weights = (weights[0].to(dtype), weights[1])
    exact, _ = run(inputs, torch.float64, "reference", weights, **kwargs)
    plain, _ = run(inputs, dtype, "reference", weights, **kwargs)
    poison()
    found, _ = run(inputs, dtype, "triton", weights, **kwargs)
    again, _ = run(inputs, dtype, "triton", weights, **kwargs)
    for name, value in exact.items():
        limit = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
        assert relative_error(found[name], value) <= limit, name
        assert torch.equal(found[name], again[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("b", "length", "d", "n"),
    [
        (2, 1, 64, 16),
        (2, 63, 64, 16),
        (3, 65, 100, 16),
        (1, 127, 64, 8),
        (2, 1000, 96, 16),
        (1, 4097, 64, 16),
        (400, 130, 96, 16),
        (2, 300, 64, 1),
        (2, 300, 64, 5),
        (2, 300, 64, 32),
        (2, 300, 64, 64),
        (2, 300, 64, 128),
        (2, 300, 33, 256),
    ],
)
def test_half_precision_loses_no_more_than_plain_pytorch(
    b: int, length: int, d: int, n: int, packed: bool, dtype: torch.dtype
) -> None:
    check_half(draw(b, length, d, n), dtype, seq_idx=ids(b, length) if packed else None)


def shipped() -> list[Any]:
    """List every configuration of every tuned file, with a shape that it is for."""
    cases = []
    for major in (0, 9):
        for index, entry in enumerate(launch.TUNED.entries(major)):
            low = {name: bounds[0] for name, bounds in entry["when"].items()}
            bits, n = low.get("bits", 16), low.get("n", 16)
            cases.append(pytest.param(entry, bits, n, id=f"sm{major}0-{index}"))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize(("entry", "bits", "n"), shipped())
def test_every_configuration_is_right(entry: dict[str, Any], bits: int, n: int) -> None:
    config = launch.TUNED.parse(entry["use"])
    alone = {
        name: replace(getattr(config, name), alone=1) for name in ("scan", "ends", "gradients")
    }
    for choice in (config, replace(config, **alone)):
        override_config(choice)
        check_float32(draw(2, 700, 70, n), seq_idx=ids(2, 700))
        if bits == 16:
            check_half(draw(2, 700, 70, n), torch.bfloat16)


@pytest.mark.gpu
def test_a_long_sequence_is_right() -> None:
    length = 262_144
    inputs = draw(1, length, 4, 16)
    exact, weights = run(inputs, torch.float64, "reference")
    found, _ = run(inputs, torch.float32, "triton", weights)
    for name, value in exact.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@pytest.mark.gpu
def test_offsets_beyond_32_bits_are_right() -> None:
    b, length, d, n = 3, 131_072, 6144, 1
    x = torch.zeros(b, length, d, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    x[-1, -300:] = torch.randn(300, d, device=DEVICE, dtype=torch.bfloat16)
    tail = slice(length - 300, length)
    A = -torch.rand(d, n, device=DEVICE)
    B, C = torch.randn(2, b, length, n, device=DEVICE, dtype=torch.bfloat16)
    dt = torch.full((1, 1, 1), 0.1, device=DEVICE, dtype=torch.bfloat16).expand(b, length, d)
    leaves = [t.requires_grad_() for t in (x, A, B, C)]
    y = selective_scan(x, dt, A, B, C, impl="triton")
    found = torch.autograd.grad(y[-1, tail].float().square().sum(), leaves)
    cut = [t[-1:, tail].detach().requires_grad_() for t in (x, B, C)]
    expected = selective_scan(cut[0], dt[-1:, tail], A, cut[1], cut[2], impl="triton")
    wanted = torch.autograd.grad(expected.float().square().sum(), [cut[0], A, cut[1], cut[2]])
    assert torch.equal(y[-1, tail], expected[0])
    for got, want in zip(found, wanted, strict=True):
        got = got if got.ndim == 2 else got[-1, tail]
        assert relative_error(got, want.reshape(got.shape)) <= 1e-2


@pytest.mark.gpu
def test_operators_pass_opcheck_and_compile_whole() -> None:
    inputs = draw(1, 100, 64, 16)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")}
    arguments = (*leaves.values(), None, None, None, None, None, True, 0.0, math.inf, True)
    torch.library.opcheck(
        launch.forward_op, arguments, test_utils=("test_schema", "test_faketensor")
    )

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(x, dt, A, B, C, dt_softplus=True, impl="triton").square().sum()

    eager = torch.autograd.grad(call(*leaves.values()), list(leaves.values()))
    compiled = torch.compile(call, fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves.values()), list(leaves.values()))
    for a, e in zip(found, eager, strict=True):
        assert relative_error(a, e) <= 1e-6


def test_every_shape_has_a_configuration() -> None:
    for major in (0, 8, 9):
        for bits in (16, 32):
            for rows in (1, 1000, 100_000):
                for n in (1, 16, 100, 256):
                    config = choose_config(major, bits=bits, rows=rows, n=n)
                    assert config.segment % config.chunk == 0
                    for blocks in (config.scan, config.ends, config.gradients):
                        assert config.chunk % blocks.steps == 0


@pytest.mark.parametrize(
    ("length", "programs", "expected"),
    [(1, 1, 64), (4096, 2000, 4096), (4096, 512, 512), (4097, 1, 320), (1000, 1, 384)],
)
def test_segments_are_whole_chunks(length: int, programs: int, expected: int) -> None:
    found = segment_length(Blocks(alone=1024, programs=4096), Config(), length, programs)
    assert found == expected


def test_kernels_say_what_they_cannot_take() -> None:
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    B = torch.randn(1, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='reference'"):
        selective_scan(x, x, -torch.rand(2, 3).double(), B, B, impl="triton")


@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forward, backward = (
        importlib.import_module(f"mamba2lm.ops.selective_scan.{name}")
        for name in ("forward", "backward")
    )
    config = choose_config(0 if target[1] != 90 else 9, bits=16, rows=40_960, n=16)
    shared = {
        "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True, "CLAMP": False,
        "HAS_RESTARTS": True, "HAS_ENTER": True, "HAS_LEAVE": True, "HAS_INITIAL": True,
        "SAVE": True, "EVEN": False, "EVEN_N": True, "Q": config.chunk, "N": 16,
        "KEEP": config.keep, "X_L": 1536, "DT_L": 1536, "B_L": 80, "C_L": 80, "Z_L": 3072,
        "Y_L": 1536, "DY_L": 1536, "VALUE_L": 1536, "KEY_L": 80, "CHANNELS": 1536, "STATES": 16,
        "PACKED": True, "SPREAD": not config.dot, "DOT": config.dot,
        # Unrolled less than when run: the compiler's time grows with it.
        "WALK": config.gradients.steps, "EVEN_WALK": False,
        "PRECISION": "tf32" if target[0] == "cuda" else "ieee",
    }  # fmt: skip
    to_compile: list[tuple[Any, Blocks, dict[str, Any]]] = [
        (forward.scan_kernel, config.scan, {}),
        (forward.ends_kernel, config.ends, {"REVERSE": True}),
        (forward.pass_kernel, replace(config.ends, warps=4), {"REVERSE": True, "BLOCK": 256}),
        (backward.gradients_kernel, config.gradients, {}),
        (backward.reduce_kernel, Blocks(warps=4),
         {"SECOND": True, "BLOCK": 256, "SPLIT_BLOCK": 4}),
    ]  # fmt: skip
    half = {"x", "dt", "B", "C", "z", "dy", "y", "dx", "ddt", "dz", "value", "key",
            "first", "second"}  # fmt: skip
    for kernel, blocks, extra in to_compile:
        all_constants = {
            **shared,
            "D_BLOCK": launch.channel_block(blocks, 16),
            "STEPS": blocks.steps,
            **extra,
        }
        constants = {k: v for k, v in all_constants.items() if k in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                tensor = name.removesuffix("_ptr")
                signature[name] = (
                    "*u8" if tensor == "restart" else "*bf16" if tensor in half else "*fp32"
                )
            else:
                signature[name] = "fp32" if name in ("low", "high", "unit") else "i32"
        limit = {"maxnreg": blocks.registers} if blocks.registers and target[0] == "cuda" else {}
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget(*target),
            options={"num_warps": blocks.warps, "num_stages": 1, **limit},
        )
        assert compiled.metadata.shared <= 64 * 1024
