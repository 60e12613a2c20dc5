"""The norms' Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import gated_rms_norm, kernels, rms_norm, rms_norm_residual
from mamba2lm.ops.gated_rms_norm import launch
from mamba2lm.ops.gated_rms_norm.launch import Blocks

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

SMALL = Blocks(warps=1, elements=4, programs=5, stages=2)
FUNCTIONS: dict[str, Any] = {
    "plain": rms_norm,
    "gated": gated_rms_norm,
    "residual": rms_norm_residual,
}
OPERATORS = tuple(FUNCTIONS)


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    launch.tuned_blocks()


def draw(operator: str, rows: int, d: int) -> dict[str, Tensor]:
    """Draw float32 inputs; the gate is a slice of a wider tensor, as a layer's is."""
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    drawn = {"x": randn(1, rows, d), "weight": randn(d)}
    if operator == "gated":
        drawn["z"] = randn(1, rows, 2 * d + 8)[..., 8 : 8 + d]
    if operator == "residual":
        drawn["residual"] = randn(1, rows, d)
    return drawn


def run(
    operator: str,
    inputs: dict[str, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    impl: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Return outputs and every gradient; ``dtypes`` are those of layers and of everything else."""
    leaves = {
        name: tensor.to(dtypes[0] if name in ("x", "z") else dtypes[1]).detach().requires_grad_()
        for name, tensor in inputs.items()
    }
    result: Any = FUNCTIONS[operator](**leaves, eps=1e-3, impl=impl, **kwargs)
    outputs = {"y": result} if isinstance(result, Tensor) else {"y": result[0], "sum": result[1]}
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o) for o in outputs.values()
    ]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {k: v.detach() for k, v in outputs.items()} | {
        f"d{name}": value for name, value in zip(leaves, found, strict=True)
    }


def check_float32(operator: str, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    exact = run(operator, inputs, (torch.float64, torch.float64), "reference", **kwargs)
    narrow = (torch.float32, torch.float32)
    poison()
    found = run(operator, inputs, narrow, "triton", **kwargs)
    again = found
    if not kernels.INTERPRETED:  # which runs one program after another
        poison()
        again = run(operator, inputs, narrow, "triton", **kwargs)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name
        assert torch.equal(found[name], again[name]), name


@runs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("rows", "d"), [(1, 24), (7, 40), (19, 17)])
def test_float32_matches_the_reference(operator: str, rows: int, d: int) -> None:
    launch.override_blocks(SMALL, SMALL)
    check_float32(operator, draw(operator, rows, d))


@runs_kernels
@pytest.mark.parametrize("group_size", [8, 12, 1])
def test_groups_match_the_reference(group_size: int) -> None:
    launch.override_blocks(SMALL, SMALL)
    check_float32("gated", draw("gated", 9, 4 if group_size == 1 else 24), group_size=group_size)


@runs_kernels
def test_sum_alone_may_be_differentiated_to_match() -> None:
    x, residual, weight = (
        torch.randn(5, 24, device=DEVICE, requires_grad=True),
        torch.randn(5, 24, device=DEVICE, requires_grad=True),
        torch.ones(24, device=DEVICE, requires_grad=True),
    )
    _, total = rms_norm_residual(x, residual, weight, impl="triton")
    dx, dresidual, dweight = torch.autograd.grad(total, (x, residual, weight), total)
    torch.testing.assert_close(dx, total)
    torch.testing.assert_close(dresidual, total)
    assert not dweight.count_nonzero()


@runs_kernels
def test_gradients_land_where_they_are_wanted_and_match() -> None:
    """A layer lets dz land in its projection's gradient and has y computed again."""
    inputs = draw("gated", 9, 40)
    x, z, weight = inputs["x"], inputs["z"], inputs["weight"]
    y, _, scale = launch.forward(x, z, None, weight, 1e-5, 40, torch.float32)
    arguments = (torch.randn_like(x), None, x, z, weight, scale, 40, torch.float32)
    dx, dz, _, _ = launch.backward(*arguments)
    wide = torch.full((1, 9, 200), math.nan, device=DEVICE)
    launch.backward(
        *arguments, dx_out=wide[..., :40], dz_out=wide[..., 50:90], y_out=wide[..., 100:140]
    )
    for start, value in ((0, dx), (50, dz), (100, y)):
        torch.testing.assert_close(wide[..., start : start + 40], value, rtol=1e-6, atol=1e-6)
    assert wide[..., 40:50].isnan().all()
    assert wide[..., 90:100].isnan().all()
    assert wide[..., 140:].isnan().all()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gated", "width"), [(True, 40), (False, 40), (True, 300), (True, 2048)])
def test_what_is_made_again_and_match_is_to_the_last_bit(
    gated: bool, width: int, dtype: torch.dtype
) -> None:
    """A run that keeps outputs and one that does not learn the same."""
    inputs = draw("gated", 9, width)
    x, z = inputs["x"].to(dtype), inputs["z"].to(dtype) if gated else None
    y, _, scale = launch.forward(x, z, None, inputs["weight"], 1e-5, width, dtype)
    again = torch.full_like(y, math.nan)
    launch.backward(
        torch.randn_like(x), None, x, z, inputs["weight"], scale, width, dtype, y_out=again
    )
    torch.testing.assert_close(again, y, rtol=0, atol=0)


@runs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_match_their_fakes_and_compile_whole(operator: str) -> None:
    launch.override_blocks(SMALL, SMALL)
    inputs = {name: value.requires_grad_() for name, value in draw(operator, 2, 3).items()}
    arguments = (
        inputs["x"], inputs.get("z"), inputs.get("residual"), inputs["weight"], 1e-5, 3,
        torch.bfloat16,
    )  # fmt: skip
    torch.library.opcheck(launch.forward_op, arguments)
    names = list(inputs)

    def call(*tensors: Tensor) -> Tensor:
        result: Any = FUNCTIONS[operator](**dict(zip(names, tensors, strict=True)), impl="triton")
        results = (result,) if isinstance(result, Tensor) else result
        return torch.stack([value.square().sum() for value in results]).sum()

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
    run_in_interpreter(__file__, "match", passed=25)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("rows", "d", "group_size"),
    [(1, 64, 64), (63, 768, 768), (1000, 1536, 512), (300, 1001, 1001), (130, 5120, 5120),
     (4097, 640, 64), (33, 16384, 16384)],
)  # fmt: skip
def test_half_precision_loses_no_more_than_plain_pytorch(
    rows: int, d: int, group_size: int, operator: str, dtype: torch.dtype
) -> None:
    inputs = draw(operator, rows, d)
    for name in {"x", "z"} & set(inputs):
        inputs[name] = inputs[name].to(dtype)
    options = {"group_size": group_size} if operator == "gated" else {}
    exact = run(operator, inputs, (torch.float64, torch.float64), "reference", **options)
    dtypes = (dtype, torch.float32)
    plain = run(operator, inputs, dtypes, "reference", **options)
    poison()
    found = run(operator, inputs, dtypes, "triton", **options)
    poison()
    again = run(operator, inputs, dtypes, "triton", **options)
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype
        assert torch.equal(found[name], again[name]), name
        limit = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
        assert relative_error(found[name], value) <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("rows", "d"), [(1, 64), (1000, 768), (301, 1001), (4097, 2560)])
def test_tuned_float32_matches_the_reference(operator: str, rows: int, d: int) -> None:
    check_float32(operator, draw(operator, rows, d))


@pytest.mark.gpu
def test_float32_stream_enters_half_precision_layers() -> None:
    x = torch.randn(100, 768, device="cuda", requires_grad=True)
    weight = torch.randn(768, device="cuda", requires_grad=True)
    y = rms_norm(x, weight, out_dtype=torch.bfloat16, impl="triton")
    expected = rms_norm(x, weight, out_dtype=torch.bfloat16, impl="reference")
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 1e-3
    dy = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, weight), dy),
        torch.autograd.grad(expected, (x, weight), dy),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 1e-6


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    rows, d = 540_000, 4096
    x = torch.empty(rows, d, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.randn(d, device="cuda")
    y, _, scale = launch.forward(x, x, None, weight, 1e-5, d, x.dtype)
    dx, dz, _, _ = launch.backward(x, None, x, x, weight, scale, d, x.dtype)
    tail = x[-30:].float().requires_grad_()
    gate = x[-30:].float().requires_grad_()
    expected = gated_rms_norm(tail, gate, weight, impl="reference")
    dtail, dgate = torch.autograd.grad(expected, (tail, gate), tail.detach())
    for got, wanted in ((y, expected), (dx, dtail), (dz, dgate)):
        assert relative_error(got[-30:], wanted) < 4e-3


def test_kernels_say_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 20_000), torch.ones(20_000)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="groups of 20000 channels"):
        rms_norm(x, weight, impl="triton")


@pytest.mark.parametrize("width", [1, 3, 24, 640, 768, 1001, 1536, 2560, 5120, 16384])
def test_rows_are_cut_with_little_padding(width: int) -> None:
    piece, pieces = launch.cut(width)
    assert piece & (piece - 1) == 0
    assert pieces <= launch.MOST_PIECES
    assert width <= piece * pieces < width + piece
    assert piece * pieces <= 1.15 * width or width < 32


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.gated_rms_norm import backward, forward

    types = dict.fromkeys(("weight", "scale", "partial", "residual", "sum", "dresidual"), "*fp32")
    for width, launches, options in (
        (5120, (launch.FORWARD, launch.GATED_BACKWARD),
         {"GATED": True, "ADD": False, "HAS_DSUM": False, "TWO_DTYPES": False}),
        (4096, (launch.FORWARD, launch.WIDE_GATED_BACKWARD),
         {"GATED": True, "ADD": False, "HAS_DSUM": False, "TWO_DTYPES": False}),
        (2048, (launch.FORWARD, launch.MIDDLE_GATED_BACKWARD),
         {"GATED": True, "ADD": False, "HAS_DSUM": False, "TWO_DTYPES": False}),
        (2048, (launch.FORWARD, launch.NARROW_BACKWARD),
         {"GATED": False, "ADD": True, "HAS_DSUM": True, "TWO_DTYPES": True}),
        (768, (launch.FORWARD, launch.NARROWEST_BACKWARD),
         {"GATED": False, "ADD": True, "HAS_DSUM": True, "TWO_DTYPES": True}),
    ):  # fmt: skip
        piece, pieces = launch.cut(width)
        for kernel, blocks in zip(
            (forward.rms_norm_kernel, backward.rms_norm_backward_kernel), launches, strict=True
        ):
            constants = {
                **options, "WANT_Y": True, "ROWS": launch._rows_at_once(width, blocks),
                "WIDTH": width, "PIECE": piece, "PIECES": pieces, "UNIT": 8,
                "STAGES": blocks.stages,
            }  # fmt: skip
            compile_kernel(
                kernel, constants, {**types, "eps": "fp32"}, target, num_warps=blocks.warps
            )


@pytest.mark.parametrize("width", [768, 1024, 1536, 2048, 4096])
def test_gates_gradient_takes_a_row_at_a_time_in_few_registers(width: int) -> None:
    blocks = launch.backward_blocks(width, gated=True)
    rows = launch._rows_at_once(width, blocks)
    assert width * rows <= 16 * 32 * blocks.warps  # 16 elements a thread: two programs fit


def test_pipelining_stays_within_shared_memory() -> None:
    narrow, wide = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    deep = Blocks(warps=8, elements=24, programs=264, stages=3)
    assert launch._stages(deep, 5120, narrow, None, narrow, narrow) == 3
    assert launch._stages(deep, 5120, wide, None, wide, wide) == 1
    assert launch._stages(deep, 16384, narrow) == 3
    assert launch._stages(deep, 16384, narrow, narrow) == 1
