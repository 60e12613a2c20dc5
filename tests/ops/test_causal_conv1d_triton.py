"""The convolution's Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import causal_conv1d, kernels
from mamba2lm.ops.causal_conv1d import launch
from mamba2lm.ops.causal_conv1d.launch import Blocks

from .inputs import seq_idx
from .kernel_runs import (
    COMPILER,
    DEVICE,
    FLOAT_LIMIT,
    TARGETS,
    compile_kernel,
    poison,
    run_in_interpreter,
    runs_kernels,
)
from .tolerances import NAIVE_ERROR_RATIO, relative_error

pytest.importorskip("triton")

SMALL = Blocks(channels=16, warps=1, ahead=4, programs=4)
EARLY = Blocks(channels=16, warps=1, ahead=4, programs=4, prefetch=True)


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    launch.tuned_blocks()


def draw(length: int, *, b: int = 1, d: int = 13, w: int = 4) -> dict[str, Tensor]:
    """Draw float32 inputs; x is a slice of a wider tensor, as a layer's is."""
    generator = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    wide = randn(b, length, 2 * d + 8)
    return {
        "x": wide[..., 8 : 8 + d],
        "weight": randn(d, w),
        "bias": randn(d),
        "initial_states": randn(b, w - 1, d),
    }


def run(
    inputs: dict[str, Tensor], dtype: torch.dtype, impl: Any, *, final: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    """Return outputs and every gradient, under a fixed random weighting of the outputs."""
    leaves = {
        name: tensor.to(dtype).detach().requires_grad_()
        for name, tensor in inputs.items()
        if tensor.numel()
    }
    result = causal_conv1d(**leaves, return_final_states=final, impl=impl, **kwargs)
    outputs = {"y": result[0], "final": result[1]} if final else {"y": result}
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o) for o in outputs.values()
    ]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {k: v.detach() for k, v in outputs.items()} | {
        f"d{name}": value for name, value in zip(leaves, found, strict=True)
    }


def check_float32(inputs: dict[str, Tensor], **kwargs: Any) -> None:
    exact = run(inputs, torch.float64, "reference", **kwargs)
    poison()
    found = run(inputs, torch.float32, "triton", **kwargs)
    again = found
    if not kernels.INTERPRETED:  # which runs one program after another
        poison()
        again = run(inputs, torch.float32, "triton", **kwargs)
    for name, value in exact.items():
        if value.count_nonzero():
            assert relative_error(found[name], value) <= FLOAT_LIMIT, name
        else:
            assert not found[name].count_nonzero(), name
        assert torch.equal(found[name], again[name]), name


@runs_kernels
@pytest.mark.parametrize(
    ("length", "w", "packed"),
    [(1, 4, True), (2, 4, True), (13, 4, True), (13, 4, False), (9, 2, True)],
)
def test_float32_matches_the_reference(length: int, w: int, packed: bool) -> None:
    launch.override_blocks(SMALL, SMALL)
    ids = seq_idx(1, length).to(DEVICE) if packed else None
    check_float32(draw(length, w=w), activation="silu", seq_idx=ids)


@runs_kernels
@pytest.mark.parametrize(("blocks", "length"), [(SMALL, 5), (EARLY, 5), (EARLY, 12)])
def test_every_row_and_block_of_channels_matches(blocks: Blocks, length: int) -> None:
    launch.override_blocks(blocks, blocks)
    ids = seq_idx(2, length).to(DEVICE)
    check_float32(draw(length, b=2, d=20), activation="silu", seq_idx=ids)


@runs_kernels
@pytest.mark.parametrize(("w", "blocks"), [(1, SMALL), (3, SMALL), (1, EARLY)])
def test_optional_arguments_may_be_absent_in_kernels(w: int, blocks: Blocks) -> None:
    launch.override_blocks(blocks, blocks)
    inputs = draw(10, w=w)
    del inputs["initial_states"], inputs["bias"]
    check_float32(inputs, final=False)


@runs_kernels
def test_returning_ids_do_not_match_across_a_document() -> None:
    launch.override_blocks(SMALL, SMALL)
    ids = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0]], device=DEVICE)
    check_float32(draw(11, b=1), activation="silu", seq_idx=ids)


@runs_kernels
def test_another_document_cannot_leak_even_infinities_into_kernels() -> None:
    inputs = draw(12, b=1)
    ids = torch.tensor([[0] * 6 + [1] * 6], device=DEVICE)
    clean = run(inputs, torch.float32, "triton", seq_idx=ids)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, :6] = torch.inf
    spoilt = run(inputs, torch.float32, "triton", seq_idx=ids)
    assert torch.equal(spoilt["y"][:, 6:], clean["y"][:, 6:])
    assert torch.equal(spoilt["dx"][:, 6:], clean["dx"][:, 6:])


@runs_kernels
def test_gradient_is_written_into_a_wider_tensor_and_matches() -> None:
    """A layer lets the gradient of its slice land in the gradient of the whole projection."""
    inputs = draw(5)
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], inputs["initial_states"], None)
    dy = torch.randn(1, 5, 13).to(DEVICE)
    expected = launch.backward(dy, None, *arguments, True)[0]
    wide = torch.full((1, 5, 50), math.nan, device=DEVICE)
    launch.backward(dy, None, *arguments, True, dx_out=wide[..., 7:20])
    assert torch.equal(wide[..., 7:20], expected)
    assert wide[..., :7].isnan().all()
    assert wide[..., 20:].isnan().all()


@runs_kernels
def test_operators_match_their_fakes_and_compile_whole() -> None:
    launch.override_blocks(SMALL, SMALL)
    inputs = {name: value.requires_grad_() for name, value in draw(2, d=3).items()}
    ids = torch.tensor([[0, 1]], device=DEVICE)
    torch.library.opcheck(launch.forward_op, (*inputs.values(), ids, True, True))

    def call(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor) -> Tensor:
        y, final = causal_conv1d(
            x, weight, bias, activation="silu", initial_states=initial, seq_idx=ids,
            return_final_states=True, impl="triton",
        )  # fmt: skip
        return y.square().sum() + final.square().sum()

    eager = torch.autograd.grad(call(*inputs.values()), list(inputs.values()))
    compiled = torch.compile(call, fullgraph=True, backend=COMPILER)
    found = torch.autograd.grad(compiled(*inputs.values()), list(inputs.values()))
    for a, e in zip(found, eager, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    run_in_interpreter(__file__, "match or absent or leak", passed=15)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("b", "length", "d", "w"),
    [(2, 1, 64, 4), (2, 2, 64, 4), (3, 63, 776, 4), (2, 65, 1001, 3), (2, 1000, 1792, 4),
     (1, 4097, 256, 2), (1, 131, 5376, 4)],
)  # fmt: skip
def test_half_precision_loses_no_more_than_plain_pytorch(
    b: int, length: int, d: int, w: int, packed: bool, dtype: torch.dtype
) -> None:
    inputs = {name: value.to(dtype) for name, value in draw(length, b=b, d=d, w=w).items()}
    ids = seq_idx(b, length).to(DEVICE) if packed else None
    options: dict[str, Any] = {"activation": "silu", "seq_idx": ids}
    exact = run(inputs, torch.float64, "reference", **options)
    plain = run(inputs, dtype, "reference", **options)
    poison()
    found = run(inputs, dtype, "triton", **options)
    poison()
    again = run(inputs, dtype, "triton", **options)
    for name, value in exact.items():
        assert torch.equal(found[name], again[name]), name
        if value.count_nonzero():
            limit = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
            assert relative_error(found[name], value) <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 64), (3, 1000, 776), (1, 4097, 1001), (70000, 3, 8)])
def test_tuned_float32_matches_the_reference(shape: tuple[int, int, int], early: bool) -> None:
    b, length, d = shape
    if early:
        launch.override_blocks(
            *(dataclasses.replace(x, prefetch=True) for x in (launch.FORWARD, launch.BACKWARD))
        )
    ids = seq_idx(b, length).to(DEVICE)
    check_float32(draw(length, b=b, d=d), activation="silu", seq_idx=ids)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    b, length, d = 2, 270_000, 4096
    x = torch.empty(b, length, d, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.randn(d, 4, device="cuda")
    y, _ = launch.forward(x, weight, None, None, None, True, False)
    dx, *_ = launch.backward(x, None, x, weight, None, None, None, True)
    tail = x[1:, -40:].float().requires_grad_()
    expected = causal_conv1d(tail, weight, activation="silu", impl="reference")
    (dtail,) = torch.autograd.grad(expected, tail, tail.detach())
    assert relative_error(y[1, -30:], expected[0, -30:]) < 4e-3
    assert relative_error(dx[1, -30:], dtail[0, -30:]) < 4e-3


def test_kernels_say_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 4, 6, dtype=torch.float32), torch.randn(6, 5)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="weight has 5 taps"):
        causal_conv1d(x, weight, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        causal_conv1d(x.double(), weight[:, :4], impl="triton")


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.causal_conv1d import backward, forward

    given = {"HAS_BIAS": True, "HAS_INITIAL": True, "HAS_IDS": True, "HAS_DFINAL": True,
             "WANT_FINAL": True, "SILU": True, "W": 4, "UNIT": 8}  # fmt: skip
    for kernel, blocks, prefetch in (
        (forward.convolve_kernel, launch.FORWARD, False),
        (forward.convolve_kernel, launch.FORWARD, True),
        (backward.convolve_backward_kernel, launch.BACKWARD, False),
        (backward.convolve_backward_kernel, launch.BACKWARD, True),
    ):
        constants = {**given, "AHEAD": blocks.ahead, "BLOCK": blocks.channels}
        constants |= {"PREFETCH": prefetch, "NVIDIA": target[0] == "cuda"}
        types = {"weight": "*fp32", "bias": "*fp32", "partial": "*fp32", "ids": "*i64"}
        compile_kernel(kernel, constants, types, target, num_warps=blocks.warps)


def test_launches_fill_a_gpu_and_cover_every_row() -> None:
    blocks = Blocks(channels=256, warps=2, ahead=4, programs=1000)
    for length in (1, 5, 100, 4096, 100_000):
        for others in (1, 21, 84, 5000):
            rows = launch._row_count(blocks, length, others)
            programs = -(-length // rows) * others
            assert rows % blocks.ahead == 0
            assert programs <= max(1000, others)
            assert programs > 450 or rows == blocks.ahead or others > 50, (length, others)
