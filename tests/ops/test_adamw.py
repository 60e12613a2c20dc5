"""AdamW in one pass: against the reference and torch, with clipping, copies and odd sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import copies, kernels
from mamba2lm.ops.adamw import launch
from mamba2lm.ops.adamw.reference import Settings, adamw_reference

from .kernel_runs import (
    DEVICE,
    TARGETS,
    compile_kernel,
    run_in_interpreter,
    runs_kernels,
)

SIZES = ((1,), (63,), (0, 4), (7, 9), (40, 64), (3, 1000))
SETTINGS = Settings(rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1)
FLOAT_LIMIT = 3e-7
"""Relative error of an update against float64."""


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    launch.override_blocks(None)


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(DEVICE) for size in SIZES]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def test_the_reference_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    first = second = torch.zeros_like(ours)
    for step in range(1, 5):
        gradient = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        theirs.grad = 0.25 * gradient
        optimizer.step()
        settings = Settings(0.01, 0.8, 0.9, 1e-6, 0.3, step)
        ours, first, second = adamw_reference(ours, gradient, first, second, settings, 0.25)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-15)


@runs_kernels
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("elements", [64, 1024])
def test_updates_match_the_reference(clipped: bool, elements: int) -> None:
    pytest.importorskip("triton")
    launch.override_blocks(launch.Blocks(elements=elements, blocks=3))
    weights = draw(0)
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    halves = [w.bfloat16() if w.ndim > 1 else None for w in weights]
    exact = [
        (w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()) for w in weights
    ]
    factor = torch.tensor(0.37, device=DEVICE) if clipped else None
    for step in range(1, 4):
        gradients = draw(step)
        kept = [g.clone() for g in gradients]
        settings = Settings(3e-3, 0.9, 0.95, 1e-8, 0.1, step)
        launch.Update(weights, gradients, *moments, halves, factor).launch(settings)
        by = 1.0 if factor is None else factor.double()
        exact = [
            adamw_reference(w, g.double(), m, v, settings, by)
            for (w, m, v), g in zip(exact, gradients, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    for index, (w, m, v) in enumerate(exact):
        if not w.numel():
            continue
        assert error(weights[index], w) <= FLOAT_LIMIT
        assert error(moments[0][index], m) <= FLOAT_LIMIT
        assert error(moments[1][index], v) <= FLOAT_LIMIT
        half = halves[index]
        if half is not None and kernels.INTERPRETED:  # which cuts bits off instead of rounding
            torch.testing.assert_close(half.float(), weights[index], rtol=2**-7, atol=0.0)
        elif half is not None:
            assert torch.equal(half, weights[index].bfloat16())


@runs_kernels
def test_updates_of_tensors_that_lie_askew_match() -> None:
    """Addresses that are no multiples of 16 bytes, as of views of one buffer."""
    pytest.importorskip("triton")
    buffer = torch.randn(2, 41, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight, gradient = buffer[0, 1:], buffer[1, 3:]
    gradient = torch.cat([gradient, gradient[:2]])
    assert weight.data_ptr() % 16
    exact = adamw_reference(
        weight.double(), gradient.double(), *[torch.zeros(40, device=DEVICE).double()] * 2, SETTINGS
    )
    before = buffer.clone()
    moments = [[torch.zeros(40, device=DEVICE)] for _ in range(2)]
    launch.Update([weight], [gradient], *moments, [None]).launch(SETTINGS)
    assert error(weight, exact[0]) <= FLOAT_LIMIT
    buffer[0, 1:] = before[0, 1:]
    assert torch.equal(buffer, before), "something beside the tensor was written"


@runs_kernels
def test_updates_of_nothing_match_nothing() -> None:
    pytest.importorskip("triton")
    nothing = [[torch.zeros(0, 3, device=DEVICE)] for _ in range(4)]
    launch.Update(*nothing, [None]).launch(SETTINGS)
    assert nothing[0][0].shape == (0, 3)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernel_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    pytest.importorskip("triton")
    run_in_interpreter(__file__, "updates", passed=6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("full", [True, False])
def test_kernel_compiles_without_a_gpu(target: tuple[str, Any, int], full: bool) -> None:
    pytest.importorskip("triton")
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.adamw.kernels import adamw_kernel

    numbers = ("kept", "beta1", "rest1", "beta2", "rest2", "step", "correction", "eps")
    types = {"table": "*i64", "size": "*i64", "owner": "*i32", "place": "*i32", "factor": "*fp32"}
    constants = {
        "HAS_FACTOR": full, "HAS_COPY": full, "ALIGNED": full,
        "BLOCK": launch.TUNED.elements, "BLOCKS": launch.TUNED.blocks,
    }  # fmt: skip
    compile_kernel(
        adamw_kernel, constants, types | dict.fromkeys(numbers, "fp32"), target,
        num_warps=launch.TUNED.warps,
    )  # fmt: skip


def test_what_the_kernel_does_not_take_is_said() -> None:
    assert "need a GPU" in (launch.unsupported(torch.zeros(2)) or "need a GPU")
    if kernels.INTERPRETED:
        assert "float64" in str(launch.unsupported(torch.zeros(2, dtype=torch.float64)))
        assert "bfloat16" in str(launch.unsupported(torch.zeros(2, dtype=torch.bfloat16)))
        assert "contiguous" in str(launch.unsupported(torch.zeros(2, 3).t()))


def test_a_copy_is_of_the_weight_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.tensor([1 / 3, math.pi]))
    assert copies.in_dtype(weight, torch.float32) is weight
    loose = copies.in_dtype(weight, torch.bfloat16)
    assert copies.in_dtype(weight, torch.bfloat16) is not loose  # nobody follows it
    assert copies.kept_copy(weight) is None
    copies.follow(weight)
    kept = copies.in_dtype(weight, torch.bfloat16)
    assert copies.in_dtype(weight, torch.bfloat16) is kept
    assert copies.in_dtype(weight, torch.float16).dtype == torch.float16
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(copies.in_dtype(weight, torch.bfloat16), weight.detach().bfloat16())
    weight.data = torch.tensor([5.0, 7.0])
    assert torch.equal(copies.in_dtype(weight, torch.bfloat16), weight.detach().bfloat16())
    copy = copies.kept_copy(weight)
    assert copy is not None
    with torch.no_grad():
        weight.add_(1)
    copy.mark(weight)  # who says so is believed
    assert torch.equal(copies.in_dtype(weight, torch.bfloat16), torch.tensor([5.0, 7.0]).bfloat16())


def test_copies_are_renewed_where_their_weights_have_changed() -> None:
    followed = [torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0)]
    loose = torch.nn.Parameter(torch.ones(2))
    for weight in followed:
        copies.follow(weight)
    kept = [copies.in_dtype(weight, torch.bfloat16) for weight in followed]
    with torch.no_grad():
        followed[0].add_(0.5)
        kept[1].fill_(9.0)  # its weight is as it was
    copies.renew([*followed, loose])
    assert [tensor.tolist() for tensor in kept] == [[1.5, 1.5], [9.0, 9.0]]
    assert copies.in_dtype(followed[0], torch.bfloat16) is kept[0]
