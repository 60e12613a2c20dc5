"""The gated norm of divided channels: formulas and kernels, against the norm of whole channels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from mamba2lm.ops import gated_rms_norm, gated_rms_norm_divided, kernels
from mamba2lm.ops.gated_rms_norm import divided
from mamba2lm.ops.gated_rms_norm.divided import Runs

from .kernel_runs import (
    DEVICE,
    FLOAT_LIMIT,
    TARGETS,
    compile_kernel,
    poison,
    run_in_interpreter,
    runs_kernels,
)
from .tolerances import relative_error

ROWS, CHANNELS = 9, 24
RUNS = {"one group": [0], "two groups": [0, 1], "runs of one group": [0, 0, 1, 1]}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Let this process be a group by itself; several are in tests/distributed."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def draw() -> dict[str, Tensor]:
    """Draw inputs; the gate is a slice of a wider tensor, as a layer's is."""
    generator = torch.Generator().manual_seed(0)
    x, wide = (torch.randn(1, ROWS, n, generator=generator) for n in (CHANNELS, 2 * CHANNELS))
    weight = torch.randn(CHANNELS, generator=generator)
    return {"x": x.to(DEVICE), "z": wide.to(DEVICE)[..., 8 : 8 + CHANNELS], "weight": weight}


def run(inputs: dict[str, Tensor], dtype: torch.dtype, function: Any) -> list[Tensor]:
    """Return the result and every gradient."""
    leaves = {
        name: tensor.to(DEVICE, dtype if name != "weight" or dtype.itemsize > 2 else torch.float32)
        .detach()
        .requires_grad_()
        for name, tensor in inputs.items()
    }
    y = function(**leaves)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), probe)]


def divided_norm(mine: list[int], impl: Any) -> Any:
    def norm(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        assert dist.group.WORLD is not None
        groups = len(set(mine))
        runs = Runs(dist.group.WORLD, CHANNELS // groups, tuple(mine), groups)
        return gated_rms_norm_divided(x, z, weight, runs, eps=1e-3, impl=impl)

    return norm


def whole_norm(mine: list[int]) -> Any:
    size = CHANNELS // len(set(mine))
    return lambda x, z, weight: gated_rms_norm(
        x, z, weight, eps=1e-3, group_size=size, impl="reference"
    )


@pytest.mark.parametrize("mine", RUNS.values(), ids=RUNS)
def test_the_formula_is_that_of_the_whole_norm(mine: list[int]) -> None:
    inputs = draw()
    exact = run(inputs, torch.float64, whole_norm(mine))
    for ours, theirs in zip(
        run(inputs, torch.float64, divided_norm(mine, "reference")), exact, strict=True
    ):
        assert relative_error(ours, theirs) < 1e-14


@runs_kernels
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT_LIMIT), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("mine", RUNS.values(), ids=RUNS)
def test_kernels_match_the_whole_norm(
    mine: list[int], dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divided, "PROGRAMS", 4)  # several rows each, not all as many
    inputs = {name: tensor.to(dtype) for name, tensor in draw().items()}
    exact = run(inputs, torch.float64, whole_norm(mine))
    poison()
    for ours, theirs in zip(run(inputs, dtype, divided_norm(mine, "triton")), exact, strict=True):
        assert relative_error(ours, theirs) < limit


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_made_again_and_match_is_to_the_last_bit(dtype: torch.dtype) -> None:
    """A run that keeps outputs and one that does not learn the same."""
    x, z, weight = (tensor.to(DEVICE, dtype) for tensor in draw().values())
    assert dist.group.WORLD is not None
    runs = Runs(dist.group.WORLD, CHANNELS, (0,), 1)
    y, scale = divided.forward(x, z, weight, runs, 1e-3)
    again = torch.full_like(y, math.nan)
    divided.backward(torch.randn_like(x), x, z, weight, scale, runs, y_out=again)
    torch.testing.assert_close(again, y, rtol=0, atol=0)


@pytest.mark.skipif(kernels.INTERPRETED or DEVICE == "cuda", reason="the kernels run as they are")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_interpreter(__file__, "match", passed=8)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.gated_rms_norm import divided_kernels

    floats = ("weight", "sums", "scale", "slope", "partial")
    for width in (2560, 96):
        _, sizes = divided._sizes(1, width, width)
        warps = divided._warps(sizes)
        for name in ("sums_kernel", "normalise_kernel", "gradients_kernel"):
            kernel = getattr(divided_kernels, name)
            constants = {"BACKWARD": True, "WANT_Y": True, "STAGES": divided.STAGES, **sizes}
            compile_kernel(
                kernel, constants, dict.fromkeys(floats, "*fp32"), target, num_warps=warps
            )
