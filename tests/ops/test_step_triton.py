"""The Triton kernels of one token: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm import ops
from mamba2lm.ops import Convolution, Norm, kernels
from mamba2lm.ops.linear_step import launch as linear_launch
from mamba2lm.ops.state_update import launch as state_launch

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

VECTOR = linear_launch.Blocks(n=4, k=16, warps=1, ahead=2)
ROWS = linear_launch.Blocks(n=16, k=32, warps=1, rows=16)


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    with torch.no_grad():
        yield
    linear_launch.override_blocks(None)
    state_launch.override_blocks(None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def linear_inputs(rows: int, k: int, n: int, parts: str) -> dict[str, Any]:
    """Draw float32 inputs; the gate is a slice of a wider tensor, as a layer's is."""
    drawn: dict[str, Any] = {"x": randn(rows, k), "weight": randn(n, k) * k**-0.5}
    if "bias" in parts:
        drawn["bias"] = randn(n)
    if "norm" in parts:
        drawn["norm"] = Norm(randn(k), 1e-3)
    if "gate" in parts:
        groups = 2 if "groups" in parts else 1
        drawn["norm"] = Norm(randn(k), 1e-3, k // groups)
        drawn["gate"] = randn(rows, 2 * k + 8)[:, 8 : 8 + k]
    if "taps" in parts:
        w, c = (2, n - 3) if "two" in parts else (4, n - 7)
        # One row more than there are: a batch's buffer is as wide as its longest queue.
        state = randn(rows + 1, w - 1, c)
        drawn["convolution"] = Convolution(state, randn(c, w), randn(c), start=3)
    if "residual" in parts:
        drawn["residual"] = randn(rows, n)
    return drawn


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return copies in a dtype of all tensors in named tuples, and of tensors."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True)
    if isinstance(value, tuple):
        return type(value)(*(cast(v, dtype) for v in value))
    return value


def run_linear(
    inputs: dict[str, Any], dtype: torch.dtype, impl: Any, wide: torch.dtype | None = None
) -> dict[str, Tensor]:
    given = {name: cast(value, dtype) for name, value in inputs.items()}
    if "residual" in given and wide is not None:
        given["residual"] = cast(inputs["residual"], wide)
    convolution = given.get("convolution")
    if convolution is not None:
        kept = convolution.state
        given["convolution"] = convolution._replace(state=kept[:-1])
    found = {"y": ops.linear_step(**given, impl=impl)}
    if convolution is not None:
        assert torch.equal(kept[-1], inputs["convolution"].state[-1].to(dtype))
        found["state"] = kept[:-1]
    return found


PARTS = ("", "bias residual", "norm taps", "gate groups residual", "norm bias two taps residual")


@runs_kernels
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 40, 19), (5, 40, 19), (17, 64, 33)])
def test_linear_matches_the_reference(rows: int, k: int, n: int, parts: str) -> None:
    linear_launch.override_blocks(VECTOR if rows == 1 else ROWS)
    inputs = linear_inputs(rows, k, n, parts)
    exact = run_linear(inputs, torch.float64, "reference")
    poison()
    found = run_linear(inputs, torch.float32, "triton")
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@runs_kernels
@pytest.mark.parametrize(("w", "bias", "activation"), [(4, True, "silu"), (1, False, None)])
def test_convolution_matches_the_reference(w: int, bias: bool, activation: Any) -> None:
    x, state = randn(3, 80)[:, 3:75], randn(3, w - 1, 72)
    weight, b = randn(72, w), randn(72) if bias else None
    options: dict[str, Any] = {"activation": activation}
    y, new = ops.causal_conv1d_update(
        x.double(), state.double(), weight.double(), None if b is None else b.double(), **options
    )
    before = state.clone()
    found, kept = ops.causal_conv1d_update(x, state, weight, b, impl="triton", **options)
    assert torch.equal(state, before)
    assert relative_error(found, y) <= FLOAT_LIMIT
    wide = x.clone()
    ops.causal_conv1d_update(
        wide, state, weight, b, in_place=True, out=wide, impl="triton", **options
    )
    torch.testing.assert_close(wide, found, rtol=0, atol=0)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)
    torch.testing.assert_close(kept, new.float(), rtol=0, atol=0)


def state_inputs(kind: str, b: int, h: int, p: int, g: int, n: int) -> dict[str, Tensor]:
    """Draw float32 inputs as slices of one tensor, as a layer's are; A is log(−A)."""
    if kind == "ssd":
        wide = randn(b, 2 * h * p + 2 * g * n + h + 3)
        z, x, B, C, dt, _ = wide.split([h * p, h * p, g * n, g * n, h, 3], dim=1)
        return {
            "state": randn(b, h, p, n), "x": x.unflatten(1, (h, p)), "z": z.unflatten(1, (h, p)),
            "B": B.unflatten(1, (g, n)), "C": C.unflatten(1, (g, n)), "dt": dt,
            "A": randn(h), "D": randn(h), "dt_bias": randn(h) - 1,
        }  # fmt: skip
    d = h * p
    wide = randn(b, 3 * d + 2 * n)
    x, z, dt, B, C = wide.split([d, d, d, n, n], dim=1)
    return {
        "state": randn(b, d, n), "x": x, "z": z, "dt": dt, "B": B, "C": C,
        "A": randn(d, n), "D": randn(d), "dt_bias": randn(d) - 1,
    }  # fmt: skip


UPDATES: dict[str, Any] = {"ssd": ops.ssd_state_update, "scan": ops.selective_state_update}


@runs_kernels
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 0.9)])
@pytest.mark.parametrize(("h", "p", "g", "n"), [(4, 16, 2, 16), (3, 5, 1, 12)])
@pytest.mark.parametrize("kind", list(UPDATES))
def test_state_update_matches_the_reference(
    kind: str, h: int, p: int, g: int, n: int, limit: tuple[float, float]
) -> None:
    state_launch.override_blocks(state_launch.Blocks(rows=4, warps=1))
    inputs = state_inputs(kind, 3, h, p, g, n)
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": limit, "A_is_log": True}
    exact = UPDATES[kind](**cast_all(inputs, torch.float64), **options, impl="reference")
    before = inputs["state"].clone()
    poison()
    found = UPDATES[kind](**inputs, **options, impl="triton")
    assert torch.equal(inputs["state"], before)
    again = UPDATES[kind](**inputs, **options, in_place=True, impl="triton")
    assert again[1] is inputs["state"]
    for got, twice, wanted in zip(found, again, exact, strict=True):
        assert relative_error(got, wanted) <= FLOAT_LIMIT
        assert torch.equal(got, twice)


@runs_kernels
@pytest.mark.parametrize("kind", list(UPDATES))
def test_state_update_without_optional_arguments_matches_the_reference(kind: str) -> None:
    inputs = state_inputs(kind, 2, 4, 16, 1, 16)
    for name in ("D", "z", "dt_bias"):
        del inputs[name]
    inputs["A"], inputs["dt"] = -inputs["A"].abs(), inputs["dt"].abs()
    if kind == "ssd":
        inputs["D"] = randn(4, 16)
    exact = UPDATES[kind](**cast_all(inputs, torch.float64), impl="reference")
    for got, wanted in zip(UPDATES[kind](**inputs, impl="triton"), exact, strict=True):
        assert relative_error(got, wanted) <= FLOAT_LIMIT


def cast_all(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    run_in_interpreter(__file__, "match", passed=27)
