"""The gate of an MLP and the rotation of heads: references, and kernels on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import kernels, rotary_heads, swiglu
from mamba2lm.ops.rotary import launch as rotary_launch
from mamba2lm.ops.rotary.reference import rotary_reference
from mamba2lm.ops.swiglu import launch as gate_launch

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


def gate_inputs(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(2, rows, 2 * width, generator=generator).to(DEVICE)


def gate_results(x: Tensor, impl: Any) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = swiglu(leaf, impl=impl)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy)[0]}


def head_inputs(
    length: int, h: int, k: int, p: int, pairs: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(2, length, (h + 2 * k) * p, generator=generator)
    angle = 6 * torch.rand(batch, length, pairs, generator=generator, dtype=torch.float64)
    return qkv.to(DEVICE), angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def head_results(
    inputs: tuple[Tensor, Tensor, Tensor], h: int, k: int, impl: Any
) -> dict[str, Tensor]:
    leaf = inputs[0].detach().requires_grad_()
    parts = rotary_heads(leaf, *inputs[1:], n_heads=h, n_kv_heads=k, impl=impl)
    generator = torch.Generator().manual_seed(1)
    # As attention leaves them: heads before positions in memory.
    gradients = [
        torch.randn(x.transpose(1, 2).shape, generator=generator).to(x).transpose(1, 2)
        for x in parts
    ]
    dqkv = torch.autograd.grad(parts, leaf, gradients)[0]
    return dict(zip("qkv", (x.detach() for x in parts), strict=True)) | {"dqkv": dqkv}


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    x = gate_inputs(3, 5).double()
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, x.requires_grad_())


def test_rotation_is_that_of_complex_numbers_and_leaves_the_rest() -> None:
    qkv, cos, sin = head_inputs(5, 2, 1, 10, 3, 1)
    qkv = qkv.double()
    q, k, v = rotary_heads(qkv, cos, sin, n_heads=2, n_kv_heads=1)
    heads = qkv.view(2, 5, 4, 10)
    number = torch.complex(heads[..., :3], heads[..., 3:6])
    turned = number * torch.complex(cos, sin).unsqueeze(2)
    expected = torch.cat([turned.real, turned.imag, heads[..., 6:]], dim=-1)
    torch.testing.assert_close(torch.cat([q, k], dim=2), expected[:, :, :3])
    assert torch.equal(v, heads[:, :, 3:])
    torch.testing.assert_close(rotary_reference(q, cos, -sin), heads[:, :, :2])


@runs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (9, 40), (17, 264)])
def test_float32_gates_match_the_reference(rows: int, width: int) -> None:
    pytest.importorskip("triton")
    x = gate_inputs(rows, width)
    expected = gate_results(x.double(), "reference")
    poison()
    found = gate_results(x, "triton")
    for name, value in expected.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@runs_kernels
@pytest.mark.parametrize(
    ("length", "h", "k", "p", "pairs", "batch"),
    [(1, 1, 1, 2, 1, 1), (19, 6, 2, 16, 8, 1), (18, 5, 5, 10, 3, 2)],
)
def test_float32_heads_match_the_reference(
    length: int, h: int, k: int, p: int, pairs: int, batch: int
) -> None:
    pytest.importorskip("triton")
    qkv, cos, sin = head_inputs(length, h, k, p, pairs, batch)
    expected = head_results((qkv.double(), cos, sin), h, k, "reference")
    poison()
    found = head_results((qkv, cos, sin), h, k, "triton")
    for name, value in expected.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@runs_kernels
def test_one_gradient_alone_matches() -> None:
    pytest.importorskip("triton")
    qkv, cos, sin = head_inputs(7, 2, 1, 8, 4, 1)
    found = []
    for impl in ("triton", "reference"):
        leaf = qkv.detach().requires_grad_()
        q, k, _ = rotary_heads(leaf, cos, sin, n_heads=2, n_kv_heads=1, impl=impl)  # type: ignore[arg-type]
        found.append(
            [torch.autograd.grad(x.square().sum(), leaf, retain_graph=True)[0] for x in (q, k)]
        )
    torch.testing.assert_close(found[0], found[1])


@runs_kernels
def test_operators_match_their_fakes_and_compile_whole() -> None:
    pytest.importorskip("triton")
    x = gate_inputs(4, 6)
    angles = head_inputs(4, 2, 1, 6, 2, 1)
    angles = angles[0], angles[1].float(), angles[2].float()
    torch.library.opcheck(gate_launch.forward_op, (x.requires_grad_(),))
    torch.library.opcheck(rotary_launch.forward_op, (angles[0].requires_grad_(), *angles[1:], 2, 1))

    def results() -> list[Tensor]:
        gates, heads = gate_results(x, "triton"), head_results(angles, 2, 1, "triton")
        return [*gates.values(), *heads.values()]

    def call(x: Tensor, qkv: Tensor) -> list[Tensor]:
        parts = rotary_heads(qkv, *angles[1:], n_heads=2, n_kv_heads=1, impl="triton")
        return [swiglu(x, impl="triton"), *parts]

    leaves = [x.detach().requires_grad_(), angles[0].detach().requires_grad_()]
    found = torch.compile(call, fullgraph=True, backend=COMPILER)(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(found[0].shape, generator=generator).to(x)
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(y.transpose(1, 2).shape, generator=generator).to(y).transpose(1, 2)
        for y in found[1:]
    ]
    dx, dqkv = torch.autograd.grad(found, leaves, [dy, *gradients])
    for a, e in zip([found[0], dx, *found[1:], dqkv], results(), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    pytest.importorskip("triton")
    run_in_interpreter(__file__, "match", passed=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_plain_pytorch(dtype: torch.dtype) -> None:
    x = gate_inputs(1000, 2240).to(dtype)
    qkv, cos, sin = head_inputs(1000, 12, 4, 64, 32, 1)
    qkv = qkv.to(dtype)
    for exact, plain, ours in (
        (
            gate_results(x.double(), "reference"),
            gate_results(x, "reference"),
            gate_results(x, "triton"),
        ),
        (
            head_results((qkv.double(), cos, sin), 12, 4, "reference"),
            head_results((qkv, cos, sin), 12, 4, "reference"),
            head_results((qkv, cos, sin), 12, 4, "triton"),
        ),
    ):
        for name, value in exact.items():
            assert ours[name].dtype == dtype
            allowed = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
            assert relative_error(ours[name], value) <= allowed, name


def test_misuse_is_named() -> None:
    qkv, cos, sin = head_inputs(4, 2, 1, 6, 3, 1)
    with pytest.raises(ValueError, match="5 channels"):
        swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="24 channels, which 5 heads do not divide"):
        rotary_heads(qkv, cos, sin, n_heads=3, n_kv_heads=1)
    with pytest.raises(ValueError, match=r"cos has shape \(1, 3, 3\); expected \(b=1, l=4, r\)"):
        rotary_heads(qkv, cos[:, :3], sin, n_heads=2, n_kv_heads=1)
    with pytest.raises(ValueError, match="cos has 3 angles"):
        rotary_heads(qkv[..., :16], cos, sin, n_heads=2, n_kv_heads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    pytest.importorskip("triton")
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.rotary import kernels as rotary
    from mamba2lm.ops.swiglu import kernels as gate

    blocks = {"ROWS": gate_launch.ROWS, "BLOCK": gate_launch.BLOCK, "UNIT": 8}
    for kernel in (gate.swiglu_kernel, gate.swiglu_backward_kernel):
        compile_kernel(kernel, blocks, {}, target, num_warps=gate_launch.WARPS)
    constants = {
        "BACK": True, "PAIRS": 16, "PAIR_BLOCK": 16, "REST": 32, "REST_BLOCK": 32,
        "ROWS": rotary_launch.ROWS, "HEADS": rotary_launch.HEADS, "UNIT": 8,
    }  # fmt: skip
    types = {"cos": "*fp32", "sin": "*fp32"}
    compile_kernel(rotary.rotary_kernel, constants, types, target, num_warps=rotary_launch.WARPS)
