"""The Triton kernels of the SSD: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

import itertools
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
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba2lm.ops import kernels, ssd
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.ssd import launch
from mamba2lm.ops.ssd.launch import Blocks, Config, choose_config, override_config

from .inputs import seq_idx
from .tolerances import NAIVE_ERROR_RATIO, relative_error

pytest.importorskip("triton")

FLOAT_LIMIT = 3e-5

runs_kernels = pytest.mark.skipif(
    not (kernels.INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"

CHUNKED = Config(
    forward_chunk=16,
    chunk=32,
    states=Blocks(p=16, n=16),
    scan=Blocks(programs=4),
    states_backward=Blocks(p=16, n=16, programs=1),
    through=Blocks(n=16, programs=1),
    within=Blocks(programs=3),
)
FUSED = replace(
    CHUNKED,
    fused=Blocks(p=16),
    states_backward=Blocks(p=16, n=16, direct=True),
    through=Blocks(programs=6),
    within=Blocks(programs=1),
)
DIRECT = replace(FUSED, forward_chunk=32, fused=Blocks(p=8, direct=True))


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    override_config(None)


def draw(
    b: int, length: int, h: int, p: int, g: int, n: int, *, decay: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Draw float32 inputs; x, B and C are slices of one tensor, as a layer's are."""
    generator = torch.Generator().manual_seed(length + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    fused = randn(b, length, h * p + 2 * g * n)
    x, B, C = fused.split([h * p, g * n, g * n], dim=-1)
    return {
        "x": x.view(b, length, h, p),
        "dt": randn(b, length, h) - 1,
        "A": -decay * randn(h).abs(),
        "B": B.view(b, length, g, n),
        "C": C.view(b, length, g, n),
        "D": randn(h),
        "z": randn(b, length, h, p),
        "dt_bias": randn(h),
        "initial_states": randn(b, h, p, n),
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
    y, state = ssd(**leaves, dt_softplus=True, return_final_states=True, impl=impl, **kwargs)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = tuple(torch.randn(o.shape, generator=generator).to(o.device) for o in (y, state))
    found = torch.autograd.grad(
        [y, state], list(leaves.values()), [w.to(o.dtype) for w, o in zip(weights, (y, state))]  # noqa: B905
    )  # fmt: skip
    results = {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **results}, weights


def check_float32(inputs: dict[str, Tensor], **kwargs: Any) -> None:
    exact, weights = run(inputs, torch.float64, "reference", **kwargs)
    # What a kernel forgets to write shows as NaN.
    del_later = [torch.full((1 << k,), math.nan, device=DEVICE) for k in range(8, 20)]
    del del_later
    found, _ = run(inputs, torch.float32, "triton", weights, **kwargs)
    again, _ = run(inputs, torch.float32, "triton", weights, **kwargs)
    for name, value in exact.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name
        assert torch.equal(found[name], again[name]), name


@runs_kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [CHUNKED, FUSED], ids=["chunked", "fused"])
@pytest.mark.parametrize("length", [1, 70])
def test_float32_matches_the_reference(length: int, config: Config, packed: bool) -> None:
    override_config(config)
    ids = seq_idx(2, length).to(DEVICE) if packed else None
    check_float32(draw(2, length, 4, 16, 2, 16), seq_idx=ids)


@runs_kernels
@pytest.mark.parametrize(("decay", "config"), [(1e-6, CHUNKED), (80.0, CHUNKED), (80.0, DIRECT)])
def test_extreme_decays_match_the_reference(decay: float, config: Config) -> None:
    override_config(config)
    check_float32(draw(1, 65, 4, 16, 1, 16, decay=decay), seq_idx=seq_idx(1, 65).to(DEVICE))


@runs_kernels
def test_limits_on_the_step_match_the_reference() -> None:
    override_config(DIRECT)
    check_float32(draw(1, 65, 4, 16, 1, 16), dt_limit=(0.1, 1.0))


@runs_kernels
def test_optional_arguments_may_be_absent() -> None:
    override_config(CHUNKED)
    inputs = draw(1, 40, 2, 16, 1, 16)
    for name in ("D", "z", "dt_bias", "initial_states"):
        del inputs[name]
    check_float32(inputs)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-x", __file__]
    selected = ["-k", "match or absent"]
    done = subprocess.run(
        command + selected, env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "13 passed" in done.stdout.splitlines()[-1], done.stdout[-300:]


# Their gradients have one number a head.
VECTORS = ("dA", "dD", "ddt_bias")

HALF_INPUTS = ("x", "B", "C", "dt", "z")


def half_precision(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, *, packed: bool, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return every result of float64, plain PyTorch in half precision, and the kernels."""
    b, length, h, p, g, n = shape
    inputs = draw(b, length, h, p, g, n, seed=seed)
    for name in HALF_INPUTS:
        inputs[name] = inputs[name].to(dtype)
    ids = seq_idx(b, length).to(DEVICE) if packed else None
    generator = torch.Generator().manual_seed(1)
    weights = (
        torch.randn(b, length, h, p, generator=generator).to(DEVICE, dtype),
        torch.randn(b, h, p, n, generator=generator).to(DEVICE),
    )
    exact, _ = run(inputs, torch.float64, "reference", weights, seq_idx=ids)
    plain, _ = run(inputs, dtype, "reference", weights, seq_idx=ids)
    found, _ = run(inputs, dtype, "triton", weights, seq_idx=ids)
    again, _ = run(inputs, dtype, "triton", weights, seq_idx=ids)
    for name in exact:
        assert torch.equal(found[name], again[name]), name
    return {name: (value, plain[name], found[name]) for name, value in exact.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 1, 64, 64, 1, 128),
        (2, 63, 64, 64, 1, 128),
        (40, 65, 16, 64, 1, 128),
        (1, 127, 64, 32, 2, 64),
        (2, 1000, 16, 64, 8, 128),
        (1, 4097, 16, 64, 1, 128),
        (2, 300, 32, 64, 1, 256),
        (2, 300, 32, 128, 1, 64),
        (20, 300, 16, 128, 1, 128),
        (2, 300, 32, 128, 2, 256),
        (2, 300, 32, 64, 1, 16),
    ],
)
def test_half_precision_loses_no_more_than_plain_pytorch(
    shape: tuple[int, int, int, int, int, int], packed: bool, dtype: torch.dtype
) -> None:
    for name, (exact, plain, found) in half_precision(shape, dtype, packed=packed, seed=0).items():
        if name not in VECTORS:
            limit = max(relative_error(plain, exact), 1e-6)
            assert relative_error(found, exact) <= NAIVE_ERROR_RATIO * limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2, 300, 64, 64, 1, 128), (2, 1500, 64, 64, 2, 64)])
def test_gradients_of_vectors_lose_no_more_than_plain_pytorch(
    shape: tuple[int, int, int, int, int, int], packed: bool, dtype: torch.dtype
) -> None:
    """Compare the median error of many heads: those of a few are chance, the largest ones' most.

    Each head's error counts relative to its gradient, or to the mean one where that is larger.
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in VECTORS}
    for seed in range(12):
        results = half_precision(shape, dtype, packed=packed, seed=seed)
        for name in VECTORS:
            exact, *others = (value.double() for value in results[name])
            scale = exact.abs() + exact.abs().mean()
            errors[name].append(torch.stack([(v - exact).abs() / scale for v in others]))
    for name, all_heads in errors.items():
        plain, found = torch.cat(all_heads, dim=1).median(dim=1).values.tolist()
        assert found <= NAIVE_ERROR_RATIO * max(plain, 1e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize("p", launch.HEAD_DIMS)
@pytest.mark.parametrize("n", launch.STATES)
def test_tuned_float32_matches_the_reference(p: int, n: int) -> None:
    if p * n > launch.LARGEST_FLOAT_STATE:
        pytest.skip("the kernels refuse such a state in float32")
    check_float32(draw(2, 200, 4, p, 1, n), seq_idx=seq_idx(2, 200).to(DEVICE))


@pytest.mark.gpu
def test_repeated_launches_take_the_tensors_at_hand() -> None:
    """The second time, launches are repeated by address; a graph repeats them once more."""
    for seed in (0, 1):
        check_float32(draw(2, 200, 8, 32, 1, 32, seed=seed))
    inputs = draw(2, 200, 8, 32, 1, 32, seed=2)
    del inputs["initial_states"]
    fresh = {name: torch.zeros_like(value) for name, value in inputs.items()}
    tensors: Any = dict(fresh)
    ssd(**tensors, dt_softplus=True, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd(**tensors, dt_softplus=True, impl="triton")
    for name, value in inputs.items():
        fresh[name].copy_(value)
    graph.replay()
    tensors = {name: value.double() for name, value in inputs.items()}
    expected = ssd(**tensors, dt_softplus=True, impl="reference")
    assert relative_error(y, expected) <= FLOAT_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 600])
@pytest.mark.parametrize("p", launch.HEAD_DIMS)
@pytest.mark.parametrize("n", launch.STATES)
def test_every_tuned_shape_runs_in_bfloat16(p: int, n: int, rows: int) -> None:
    """Both few chunks and many: they keep their states in different dtypes."""
    if p < 32:
        pytest.skip("the kernels refuse such heads in half precision")
    for length in (100, 577):
        inputs = draw(rows // 4, length, 4, p, 2, n)
        for name in HALF_INPUTS:
            inputs[name] = inputs[name].bfloat16()
        exact, weights = run(inputs, torch.float64, "reference")
        found, _ = run(inputs, torch.bfloat16, "triton", weights)
        for name, value in exact.items():
            # One number a head for four heads is too few for its error to average out.
            limit = 0.1 if name in VECTORS else 0.03
            assert relative_error(found[name], value) <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [1e-6, 1.0, 80.0])
def test_tuned_half_precision_takes_extreme_decays(decay: float) -> None:
    inputs = draw(1, 1000, 16, 64, 1, 128, decay=decay)
    for name in HALF_INPUTS:
        inputs[name] = inputs[name].bfloat16()
    ids = seq_idx(1, 1000).to(DEVICE)
    exact, weights = run(inputs, torch.float64, "reference", seq_idx=ids)
    plain, _ = run(inputs, torch.bfloat16, "reference", weights, seq_idx=ids)
    found, _ = run(inputs, torch.bfloat16, "triton", weights, seq_idx=ids)
    for name, value in exact.items():
        limit = max(relative_error(plain[name], value), 4e-3)
        assert relative_error(found[name], value) <= NAIVE_ERROR_RATIO * limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_262144_positions_matches_the_reference(dtype: torch.dtype) -> None:
    inputs = draw(1, 1 << 18, 2, 64, 1, 128, decay=0.1)
    for name in HALF_INPUTS:
        inputs[name] = inputs[name].to(dtype)
    exact, weights = run(inputs, torch.float64, "reference")
    found, _ = run(inputs, dtype, "triton", weights)
    limit = FLOAT_LIMIT if dtype == torch.float32 else 0.02
    for name, value in exact.items():
        assert relative_error(found[name], value) <= limit, name


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """Groups are independent: the last one alone must give what it gives among 2.2 billion."""
    free, _ = torch.cuda.mem_get_info()
    if free < 76e9:
        pytest.skip(f"needs 76 GB of GPU memory, {free / 1e9:.0f} are free")
    length, heads, groups = (1 << 19) + (1 << 14), 64, 16
    assert length * heads * 64 > 1 << 31
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, dy = randn(1, length, heads, 64), randn(1, length, heads, 64)
    B, C = (randn(1, length, groups, 128) for _ in "BC")
    dt, A = randn(1, length, heads), -torch.rand(heads, device="cuda") - 0.5
    override_config(choose_config(9, bits=16, rows=heads, length=length, p=64, n=128))

    def gradients(*inputs: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        y = ssd(*leaves, dt_softplus=True, impl="triton")
        last = heads // groups
        kept = [y.detach()[:, :, -last:].clone()]
        for gradient in torch.autograd.grad(y, leaves, dy):
            axis = 0 if gradient.ndim == 1 else 2
            size = gradient.shape[axis]
            share = size // groups if y.shape[2] == heads else size
            kept.append(gradient.narrow(axis, size - share, share).clone())
        return kept

    found = gradients(x, dt, A, B, C, dy=dy)
    last = heads // groups
    alone = gradients(
        x.detach()[:, :, -last:].contiguous(), dt.detach()[:, :, -last:].contiguous(),
        A.detach()[-last:].clone(), B.detach()[:, :, -1:].contiguous(),
        C.detach()[:, :, -1:].contiguous(), dy=dy[:, :, -last:].contiguous(),
    )  # fmt: skip
    for name, a, b in zip(("y", "dx", "ddt", "dA", "dB", "dC"), found, alone, strict=True):
        assert a.isfinite().all(), name
        assert relative_error(a.float(), b.float()) <= 4e-3, name


@pytest.mark.gpu
def test_operators_pass_opcheck_and_compile_whole() -> None:
    inputs = draw(1, 100, 4, 64, 1, 64)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")}
    arguments = (*leaves.values(), None, None, None, None, None, True, 0.0, math.inf)
    torch.library.opcheck(
        launch.forward_op, arguments, test_utils=("test_schema", "test_faketensor")
    )

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd(x, dt, A, B, C, dt_softplus=True, impl="triton").square().sum()

    eager = torch.autograd.grad(call(*leaves.values()), list(leaves.values()))
    compiled = torch.compile(call, fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves.values()), list(leaves.values()))
    for a, e in zip(found, eager, strict=True):
        assert relative_error(a, e) <= 1e-6


def test_every_shape_has_a_configuration() -> None:
    shapes = itertools.product((16, 32), (1, 100, 10_000), (1, 10**6), launch.HEAD_DIMS)
    for bits, rows, length, p in shapes:
        for major, n in itertools.product((0, 8, 9), launch.STATES):
            config = choose_config(major, bits=bits, rows=rows, length=length, p=p, n=n)
            assert config.chunk in (32, 64)
            assert config.through.warps in (4, 8)


@pytest.mark.parametrize(
    ("heads", "rows", "programs", "block"),
    [(80, 512, 528, 40), (80, 512, 100, 80), (80, 1, 10**6, 1), (7, 3, 10, 1), (12, 3, 9, 4)],
)
def test_heads_are_shared_out_evenly(heads: int, rows: int, programs: int, block: int) -> None:
    assert launch.heads_per_program(heads, rows, programs) == block


def test_large_float32_states_are_left_to_pytorch() -> None:
    with FakeTensorMode():  # of a GPU that need not be there
        for dtype, n, left in (
            (torch.float32, 128, True),
            (torch.float32, 64, False),
            (torch.bfloat16, 128, False),
        ):
            x = torch.empty(1, 4, 2, 64, device="cuda", dtype=dtype)
            B = torch.empty(1, 4, 1, n, device="cuda", dtype=dtype)
            assert launch.unsupported(x, B) is None
            assert (launch.reason_against(x, B) is not None) == left
            narrow = torch.empty(1, 4, 2, 16, device="cuda", dtype=dtype)
            assert (launch.unsupported(narrow, B) is None) == (dtype == torch.float32)


def test_kernels_say_what_they_cannot_take() -> None:
    x = torch.randn(1, 4, 2, 24)
    B = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="impl='reference'"):
        ssd(x, torch.randn(1, 4, 2), -torch.rand(2), B, B, impl="triton")


@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int], tmp_path: Path) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mamba2lm.ops.ssd import backward, forward

    major = target[1] // 10 if target[0] == "cuda" else 0
    config = choose_config(major, bits=16, rows=8, length=4096, p=64, n=64)
    shape = {
        "P": 64, "N": 64, "P_BLOCK": 64, "N_BLOCK": 64, "PRECISION": "ieee", "HEAD_BLOCK": 16,
        "COLUMNS": 1, "BACKWARD": True, "SECOND": True, "WIDTH": 128,
        "THIRD": True, "BLOCK": 16, "SPLIT_BLOCK": 128, "SOFTPLUS": True, "CLAMP": True,
    }  # fmt: skip
    q, small = config.chunk, Blocks(stages=1)
    to_compile: list[tuple[Any, Blocks, int]] = [
        (forward.steps_kernel, small, q),
        (forward.fused_kernel, small, 64),
        (forward.fused_kernel, Blocks(direct=True), 64),
        (forward.states_kernel, config.states_backward, q),
        (forward.states_kernel, Blocks(stages=3, direct=True), q),
        (forward.scan_kernel, config.scan, config.forward_chunk),
        (backward.through_states_kernel, config.through, q),
        (backward.within_kernel, config.within, q),
        (backward.gate_backward_kernel, small, 64),
        (backward.steps_backward_kernel, small, q),
        (backward.reduce_kernel, small, q),
    ]
    wide = {"initial", "dfinal", "final", "dinitial", "delta", "cum", "D", "dB", "dC", "denter",
            "dleave", "ddelta", "dcum", "dD", "skip", "A", "bias", "partial",
            "dA", "dbias", "first", "second", "third"}  # fmt: skip
    for kernel, blocks, chunk in to_compile:
        constants = {**shape, "Q": chunk, "STAGES": blocks.stages, "DIRECT": blocks.direct}
        constants = {name: constants.get(name, True) for name in kernel.arg_names
                     if name.isupper()}  # fmt: skip
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                tensor = name.removesuffix("_ptr")
                signature[name] = (
                    "*i32" if tensor == "document" else "*fp32" if tensor in wide else "*bf16"
                )
            else:
                signature[name] = "fp32" if name in ("low", "high") else "i32"
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget(*target),
            options={"num_warps": blocks.warps, "num_stages": blocks.stages},
        )
        assert compiled.metadata.shared <= 227 * 1024, kernel.__name__


def test_documents_are_numbered_as_the_kernels_expect() -> None:
    ids = torch.tensor([[5, 5, 2, 5]])
    assert document_ordinals(ids).tolist() == [[0, 0, 1, 2]]
