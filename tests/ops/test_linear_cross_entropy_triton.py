"""The softmax kernel of the head's loss: on a GPU as it is, on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import kernels, linear_cross_entropy
from mamba2lm.ops.linear_cross_entropy import chunked, launch
from mamba2lm.ops.linear_cross_entropy.launch import Blocks

from .kernel_runs import (
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

SMALL = Blocks(elements=16, warps=1, stages=2)


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    launch.override_blocks(None)


def draw(tokens: int, d: int, v: int, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(v)
    hidden = torch.randn(tokens, d, generator=generator)
    weight = torch.randn(v, d, generator=generator)
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    labels[1::5] = -100
    labels[0] = vocab_size - 1
    return {"hidden": hidden.to(DEVICE), "weight": weight.to(DEVICE)}, labels.to(DEVICE)


def run(
    tensors: dict[str, Tensor], labels: Tensor, dtype: torch.dtype, impl: Any, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: t.to(dtype).detach().requires_grad_() for name, t in tensors.items()}
    loss = linear_cross_entropy(**leaves, labels=labels, impl=impl, **options)
    found = torch.autograd.grad(3 * loss, list(leaves.values()))
    return {"loss": loss.detach(), "dhidden": found[0], "dweight": found[1]}


@runs_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("tokens", "d", "v", "vocab_size"), [(1, 8, 16, 16), (11, 8, 40, 37), (7, 5, 13, 11)]
)
def test_float32_matches_the_reference(
    tokens: int, d: int, v: int, vocab_size: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.override_blocks(SMALL)
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, DEVICE, 5 * v)
    tensors, labels = draw(tokens, d, v, vocab_size)
    options: dict[str, Any] = {"vocab_size": vocab_size, "reduction": reduction}
    expected = run(tensors, labels, torch.float64, "reference", **options)
    poison()
    found = run(tensors, labels, torch.float32, "triton", **options)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name
    assert not found["dweight"][vocab_size:].count_nonzero()
    assert not found["dhidden"][labels == -100].count_nonzero()


@runs_kernels
def test_logits_stay_where_no_gradient_is_wanted_and_losses_match() -> None:
    launch.override_blocks(SMALL)
    torch.manual_seed(0)
    logits = torch.randn(6, 40, device=DEVICE)[:, :37] * 30
    labels = torch.tensor([0, 36, -1, 5, 30, 16], device=DEVICE)
    before = logits.clone()
    loss = launch.softmax_gradient(logits, labels, 35, -1, False)
    assert torch.equal(logits, before)
    labels[1] = 34
    expected = torch.nn.functional.cross_entropy(
        logits[:, :35].double(), labels, ignore_index=-1, reduction="none"
    )
    loss = launch.softmax_gradient(logits, labels, 35, -1, True)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    gradient = before[:, :35].double().softmax(dim=1)
    gradient[torch.arange(6, device=DEVICE), labels.clamp(min=0)] -= 1
    gradient[2] = 0
    torch.testing.assert_close(logits[:, :35], gradient.float(), rtol=1e-5, atol=1e-6)
    assert not logits[:, 35:].count_nonzero()


@runs_kernels
def test_extreme_logits_match() -> None:
    launch.override_blocks(SMALL)
    logits = torch.tensor([[-3e4, 3e4, 0.0], [float("-inf"), 2.0, 2.0]], device=DEVICE)
    labels = torch.tensor([0, 1], device=DEVICE)
    loss = launch.softmax_gradient(logits, labels, 3, -100, True)
    torch.testing.assert_close(loss.cpu(), torch.tensor([6e4, 0.6931472]))
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -0.5, 0.5]])
    torch.testing.assert_close(logits.cpu(), expected)


@runs_kernels
def test_labels_that_do_not_exist_match_nothing() -> None:
    launch.override_blocks(SMALL)
    labels = torch.tensor([18, -3, 17, -100], device=DEVICE)
    loss = launch.softmax_gradient(torch.randn(4, 20, device=DEVICE), labels, 18, -100, True)
    assert loss.isnan().tolist() == [True, True, False, False]


@runs_kernels
def test_the_operator_matches_its_fake() -> None:
    launch.override_blocks(SMALL)
    logits, labels = torch.randn(3, 20, device=DEVICE), torch.arange(3, device=DEVICE)
    torch.library.opcheck(launch.softmax_gradient_op, (logits, labels, 18, -100, True))


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    run_in_interpreter(__file__, "match", passed=10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [300, 50288])
def test_half_precision_loses_no_more_than_plain_pytorch(v: int, dtype: torch.dtype) -> None:
    tensors, labels = draw(700, 768, v, v - 11)
    tensors = {name: (tensor * 0.2).to(dtype) for name, tensor in tensors.items()}
    expected = run(tensors, labels, torch.float64, "reference", vocab_size=v - 11)
    plain = run(tensors, labels, dtype, "reference", vocab_size=v - 11)
    poison()
    found = run(tensors, labels, dtype, "triton", vocab_size=v - 11)
    again = run(tensors, labels, dtype, "triton", vocab_size=v - 11)
    for name, value in expected.items():
        allowed = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-5)
        assert relative_error(found[name], value) <= allowed, name
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernel for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.linear_cross_entropy import softmax

    blocks = launch.TUNED
    constants = {"GRADIENT": True, "BLOCK": blocks.elements, "UNIT": 8, "STAGES": blocks.stages}
    for logits in ("*bf16", "*fp32"):
        compile_kernel(
            softmax.softmax_gradient_kernel,
            constants,
            {"x": logits, "labels": "*i64", "loss": "*fp32"},
            target,
            num_warps=blocks.warps,
        )
