"""The Triton kernels of one token: on a GPU as they are, on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm import ops
from mamba2lm.layers.mamba2 import Mamba2, Mamba2Config
from mamba2lm.layers.norm import RMSNorm
from mamba2lm.ops import Convolution, Norm, Scale, kernels
from mamba2lm.ops.draw.launch import draw_greedily
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
    linear_launch.override_scales(None)
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
    convolution: Convolution | None = given.get("convolution")
    kept = torch.empty(0) if convolution is None else convolution.state
    if convolution is not None:
        given["convolution"] = convolution._replace(state=kept[:-1])
    found = {"y": ops.linear_step(**given, impl=impl)}
    if convolution is not None:
        assert torch.equal(kept[-1], inputs["convolution"].state[-1].to(dtype))
        found["state"] = kept[:-1]
    return found


PARTS = ("", "bias residual", "norm taps", "gate groups residual", "norm bias two taps residual")


@runs_kernels
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("blocks", "rows", "k", "n"),
    [
        (VECTOR, 1, 40, 19),
        (ROWS, 5, 40, 19),
        (replace(ROWS, folded=False), 17, 64, 33),
        # The last of four parts of 40 inputs in tiles of 16 has none.
        (replace(ROWS, k=16, split=4), 17, 40, 33),
        (replace(ROWS, flip=True), 17, 40, 33),
    ],
)
def test_linear_matches_the_reference(
    blocks: linear_launch.Blocks, rows: int, k: int, n: int, parts: str
) -> None:
    linear_launch.override_blocks(blocks)
    inputs = linear_inputs(rows, k, n, parts)
    exact = run_linear(inputs, torch.float64, "reference")
    poison()
    found = run_linear(inputs, torch.float32, "triton")
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@runs_kernels
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("parts", ["", "taps residual"])
@pytest.mark.parametrize(
    ("blocks", "rows"), [(VECTOR, 1), (ROWS, 5), (replace(ROWS, k=16, split=2), 17)]
)
def test_scaled_linear_matches_the_norm_it_is_the_end_of(
    blocks: linear_launch.Blocks, rows: int, parts: str, groups: int
) -> None:
    linear_launch.override_blocks(blocks)
    inputs = linear_inputs(rows, 48, 33, f"norm {parts}")
    norm = inputs["norm"]._replace(group_size=48 // groups)
    x = inputs["x"].double().unflatten(1, (groups, -1))
    normed = x * torch.rsqrt(x.square().mean(dim=2, keepdim=True) + norm.eps)
    plain = {name: value for name, value in inputs.items() if name != "norm"}
    exact = run_linear(
        plain | {"x": normed.flatten(1) * norm.weight.double()}, torch.float64, "reference"
    )
    scaled = plain | {
        "x": inputs["x"] * norm.weight,
        "scale": Scale(
            inputs["x"].square().unflatten(1, (6, 8)).sum(dim=2), norm.eps, norm.group_size
        ),
    }
    for impl in ("reference", "triton"):
        poison()
        found = run_linear(scaled, torch.float32, impl)
        for name, value in exact.items():
            assert relative_error(found[name], value) <= FLOAT_LIMIT, (impl, name)


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


@runs_kernels
def test_greedy_draws_match_the_reference() -> None:
    logits, drawn = randn(5, 3001)[:, :3000], torch.zeros(5, 2, dtype=torch.int64, device=DEVICE)
    logits[1, 70] = logits[1, 2500] = 9.0
    logits[2, 2999] = float("nan")
    logits[3] = -float("inf")
    expected = logits.argmax(dim=-1)
    assert expected[1] == 70
    expected[2] = expected[3] = -1
    assert torch.equal(draw_greedily(logits, drawn[:, 1]), expected)
    assert drawn.tolist() == [[0, 1]] * 5


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
@pytest.mark.parametrize(("h", "p", "g", "n"), [(4, 16, 2, 16), (3, 5, 1, 12)])
def test_normed_state_update_matches_the_gated_norm(h: int, p: int, g: int, n: int) -> None:
    state_launch.override_blocks(state_launch.Blocks(rows=4, warps=1))
    inputs = state_inputs("ssd", 3, h, p, g, n)
    options: dict[str, Any] = {"dt_softplus": True, "A_is_log": True}
    weight, eps = randn(h * p), 1e-3
    wide = cast_all(inputs, torch.float64)
    gate = wide.pop("z").flatten(1)
    y, new = ops.ssd_state_update(**wide, **options, impl="reference")
    exact = ops.gated_rms_norm(y.flatten(1), gate, weight.double(), eps=eps, impl="reference")
    for impl in ("reference", "triton"):
        mine = cast_all(inputs, torch.float32) | {"state": inputs["state"].clone()}
        poison()
        found, squares = ops.ssd_state_update_normed(**mine, **options, norm=weight, impl=impl)  # type: ignore[arg-type]
        assert squares.shape[1] % h == 0
        scaled = found.flatten(1) * Scale(squares, eps).of(h * p)
        assert relative_error(scaled, exact) <= FLOAT_LIMIT
        assert relative_error(mine["state"], new) <= FLOAT_LIMIT
        # Every part is of equally many neighbours.
        parts = (found.flatten(1) / weight).square().unflatten(1, (h, -1)).sum(dim=2)
        assert relative_error(squares.unflatten(1, (h, -1)).sum(dim=2), parts) <= 10 * FLOAT_LIMIT


@runs_kernels
@pytest.mark.parametrize("blocks", [VECTOR, ROWS, replace(ROWS, k=16, split=2, flip=True)])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_layers_that_leave_the_norms_scale_match(
    blocks: linear_launch.Blocks, ngroups: int
) -> None:
    rows = 5 if blocks.rows else 1
    linear_launch.override_blocks(blocks)
    config = Mamba2Config(d_state=16, headdim=16, ngroups=ngroups, chunk_size=8)
    torch.manual_seed(0)
    mixer = Mamba2(config, 32)
    mixer.init_weights()
    mixer = mixer.to(DEVICE)
    mixer.norm.weight.add_(randn(*mixer.norm.weight.shape))
    norm = RMSNorm(32, 1e-5).to(DEVICE)
    found = {}
    for scales in (False, True):
        linear_launch.override_scales(scales)
        x, state = randn(rows, 32), mixer.new_state(rows)
        for _ in range(3):
            x, state = mixer.step_block(x, norm, state)
        found[scales] = [x, *(state[name] for name in state)]
    for mine, theirs in zip(*found.values(), strict=True):
        assert relative_error(mine, theirs.double()) <= FLOAT_LIMIT


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
    run_in_interpreter(__file__, "match", passed=58)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [
        (1, 768, 3352),
        (1, 5120, 2560),
        (1, 100, 333),
        (2, 2560, 1000),
        (9, 768, 3352),
        (16, 1001, 70),
    ],
)
def test_half_precision_linear_loses_no_more_than_plain_pytorch(
    rows: int, k: int, n: int, parts: str
) -> None:
    if "groups" in parts and k % 2:
        pytest.skip("an odd width has no two groups")
    if rows > 1:
        linear_launch.override_blocks(
            linear_launch.Blocks(
                n=32, k=256, warps=4, rows=8 if rows <= 8 else 16, stages=3, folded=k != 768
            )
        )
    inputs = linear_inputs(rows, k, n, parts)
    inputs = {name: cast(value, torch.bfloat16) for name, value in inputs.items()}
    exact = run_linear(inputs, torch.float64, "reference")
    # The residual stream is float32 beside bfloat16 layers.
    plain = run_linear(inputs, torch.bfloat16, "reference", torch.float32)
    poison()
    found = run_linear(inputs, torch.bfloat16, "triton", torch.float32)
    again = run_linear(inputs, torch.bfloat16, "triton", torch.float32)
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype
        assert torch.equal(found[name], again[name]), name
        limit = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
        assert relative_error(found[name], value) <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("split", [2, 3, 8])
@pytest.mark.parametrize(("rows", "k", "n"), [(64, 2560, 10576), (33, 5120, 192), (64, 1536, 770)])
def test_shared_sums_are_whole_and_the_same_every_time(
    rows: int, k: int, n: int, split: int
) -> None:
    """Programs end in another order every time, and hundreds of kernels share their counts."""
    linear_launch.override_blocks(
        linear_launch.Blocks(
            n=64, k=128, warps=4, rows=64, stages=3, split=split, flip=bool(split % 2)
        )
    )
    inputs = linear_inputs(rows, k, n, "bias taps residual")
    inputs = {name: cast(value, torch.bfloat16) for name, value in inputs.items()}
    exact = run_linear(inputs, torch.float64, "reference")
    plain = run_linear(inputs, torch.bfloat16, "reference", torch.float32)
    first = run_linear(inputs, torch.bfloat16, "triton", torch.float32)
    for name, value in exact.items():
        limit = NAIVE_ERROR_RATIO * max(relative_error(plain[name], value), 1e-6)
        assert relative_error(first[name], value) <= limit, name
    for _ in range(100):
        poison()
        again = run_linear(inputs, torch.bfloat16, "triton", torch.float32)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "p", "g", "n"), [(24, 64, 1, 128), (8, 40, 2, 64), (64, 64, 1, 16)])
@pytest.mark.parametrize("kind", list(UPDATES))
def test_half_precision_state_update_loses_no_more_than_plain_pytorch(
    kind: str, h: int, p: int, g: int, n: int, dtype: torch.dtype
) -> None:
    inputs = state_inputs(kind, 5, h, p, g, n)
    wide = ("A", "D", "dt_bias")
    narrow = {k: v if k in wide else v.to(torch.bfloat16) for k, v in inputs.items()}
    narrow["state"] = narrow["state"].to(dtype)
    options: dict[str, Any] = {"dt_softplus": True, "A_is_log": True}
    exact = UPDATES[kind](**cast_all(narrow, torch.float64), **options, impl="reference")
    plain = UPDATES[kind](**narrow, **options, impl="reference")
    poison()
    found = UPDATES[kind](**narrow, **options, impl="triton")
    for got, other, wanted in zip(found, plain, exact, strict=True):
        assert got.dtype == other.dtype
        limit = NAIVE_ERROR_RATIO * max(relative_error(other, wanted), 1e-6)
        assert relative_error(got, wanted) <= limit


@pytest.mark.gpu
def test_a_librarys_product_adds_to_the_stream_where_it_lies() -> None:
    x, weight = randn(70, 512).bfloat16(), randn(256, 512).bfloat16()
    stream = randn(70, 256)
    anew = ops.linear_step(x, weight, residual=stream)
    assert anew.data_ptr() != stream.data_ptr()
    found = ops.linear_step(x, weight, residual=stream, in_place=True)
    assert found.data_ptr() == stream.data_ptr()
    assert torch.equal(found, anew)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_that_overlap_compute_what_kernels_in_turn_do(rows: int, scaled: bool) -> None:
    """Hundreds of dependent kernels, each of which may begin before the last has ended."""
    k = 512
    if rows > 1:
        linear_launch.override_blocks(
            linear_launch.Blocks(n=64, k=64, warps=4, rows=64, stages=3, split=4)
        )
    # Only parameters are read before the previous kernel has ended.
    weights = [torch.nn.Parameter(randn(k, k, seed=i).bfloat16() * k**-0.5) for i in range(50)]
    norm = Norm(torch.nn.Parameter(torch.ones(k, device=DEVICE, dtype=torch.bfloat16)))
    state = randn(rows, 8, 64, 64)
    given: dict[str, Any] = {
        "dt": randn(rows, 8),
        "A": torch.nn.Parameter(randn(8)),
        "B": randn(rows, 1, 64),
        "C": randn(rows, 1, 64),
        "dt_softplus": True,
        "A_is_log": True,
        "early": True,
    }

    def run() -> tuple[Tensor, Tensor]:
        x, kept = randn(rows, k).to(torch.bfloat16), state.clone()
        for weight in weights * 4:
            x = ops.linear_step(x, weight, norm=norm, impl="triton")
            heads = x.view(rows, 8, 64)
            if scaled:
                y, squares = ops.ssd_state_update_normed(
                    kept, heads, z=heads, norm=norm.weight, **given
                )
                scale = Scale(squares)
                x = ops.linear_step(y.flatten(1), weight, residual=x, scale=scale, impl="triton")
                continue
            y, _ = ops.ssd_state_update(kept, heads, **given, in_place=True)
            x = ops.linear_step(y.flatten(1), weight, residual=x, impl="triton")
        return x, kept

    found = {}
    for chain in (True, False):
        kernels.override_chain(chain)
        found[chain] = run()
    kernels.override_chain(None)
    for mine, theirs in zip(found[True], found[False], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    """Compile the kernels for GPUs that this machine need not have."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.causal_conv1d import step as convolution
    from mamba2lm.ops.draw import step as draw
    from mamba2lm.ops.linear_step import step as linear
    from mamba2lm.ops.state_update import step as update

    chain = target[0] == "cuda" and target[1] >= 90
    wide = dict.fromkeys(("residual", "state", "new", "A", "D", "squares", "parts"), "*fp32")
    types = {**wide, "arrived": "*i32", "eps": "fp32", "low": "fp32", "high": "fp32"}
    parts = {
        "NORMED": True, "GATED": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "TAPS": 4,
        "HAS_TAPS_BIAS": True, "GROUPS": 2, "WIDTH": 768, "CHAIN": chain,
    }  # fmt: skip
    for rows, split, kernel in (
        (1, 1, linear.vector_kernel), (16, 1, linear.rows_kernel), (16, 4, linear.rows_kernel),
    ):  # fmt: skip
        blocks = replace(VECTOR, k=256) if rows == 1 else replace(ROWS, n=64, k=64, stages=3)
        compile_kernel(
            kernel,
            {**parts, "NORMED": split == 1, "SQUARES": 3 * (split > 1), "SPLIT": split,
             "FLIP": split > 1,
             "BLOCK_N": blocks.n, "BLOCK_K": blocks.k, "AHEAD": 4, "ROWS": rows,
             "STAGES": blocks.stages},
            types, target, num_warps=blocks.warps,
        )  # fmt: skip
    options = {
        "HAS_D": True, "D_WIDE": False, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True,
        "CLAMP": True, "LOGARITHM": True, "NORMED": True, "P": 64, "N": 128,
        "BLOCK_P": 32, "BLOCK_D": 32,
        "BLOCK_N": 128, "EARLY": True, "CHAIN": chain,
    }  # fmt: skip
    for kernel in (update.ssd_step_kernel, update.selective_step_kernel):
        compile_kernel(kernel, options, types, target, num_warps=4)
    compile_kernel(
        linear.norm_kernel, {"GATED": True, "WIDTH": 768, "BLOCK": 1024, "CHAIN": chain},
        types, target, num_warps=8,
    )  # fmt: skip
    for kernel in (draw.best_kernel, draw.choose_kernel):
        compile_kernel(
            kernel, {"PARTS": 32, "BLOCK": 1024, "CHAIN": chain},
            {"logits": "*fp32", "best": "*fp32", "place": "*i32", "drawn": "*i64",
             "token": "*i64"}, target, num_warps=4,
        )  # fmt: skip
    integers = dict.fromkeys(("seed", "drawn", "top_k", "token"), "*i64")
    numbers = dict.fromkeys(("scores", "temperature", "top_p", "min_p"), "*fp32")
    compile_kernel(
        draw.sample_kernel, {"LIMITED": True, "BLOCK": 4096, "CHAIN": chain},
        {**integers, **numbers}, target, num_warps=16,
    )  # fmt: skip
    compile_kernel(
        convolution.convolve_step_kernel,
        {"HAS_BIAS": True, "SILU": True, "W": 4, "BLOCK": 256, "CHAIN": chain},
        types, target, num_warps=2,
    )  # fmt: skip


def test_kernels_say_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    x, weight = torch.randn(20, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="20 rows, for which a library"):
        ops.linear_step(x, weight, impl="triton")
    with pytest.raises(ValueError, match="no gradient"), torch.enable_grad():
        ops.linear_step(x[:1], weight.requires_grad_(), impl="triton")


def test_kernels_read_only_parameters_before_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compute_capability", lambda _: 9)
    device, parameter = torch.device("cpu"), torch.nn.Parameter(torch.ones(2))
    assert kernels.chains(device)
    assert kernels.chains(device, parameter, None)
    assert not kernels.chains(device, parameter, parameter + 1)
    monkeypatch.setattr(kernels, "compute_capability", lambda _: 8)
    assert not kernels.chains(device, parameter)


def test_wrong_arguments_are_refused() -> None:
    x, weight, norm = torch.randn(2, 8), torch.randn(4, 8), Norm(torch.ones(8), group_size=3)
    with pytest.raises(ValueError, match="gate was given without norm"):
        ops.linear_step(x, weight, gate=x)
    with pytest.raises(ValueError, match="group_size=3 must divide the 8 inputs"):
        ops.linear_step(x, weight, gate=x, norm=norm)
    taps = Convolution(torch.zeros(2, 3, 4), torch.ones(4, 4), start=1)
    with pytest.raises(ValueError, match="4 channels do not fit into 4 outputs"):
        ops.linear_step(x, weight, convolution=taps)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 5\)"):
        ops.linear_step(x, weight, residual=torch.zeros(2, 5))
