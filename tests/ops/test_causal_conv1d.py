"""The short causal convolution and its one-token update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops import causal_conv1d, causal_conv1d_update
from mamba2lm.ops.causal_conv1d.cpu import causal_conv1d_cpu
from mamba2lm.ops.documents import document_ordinals

from .inputs import gradients, leaves, seq_idx
from .tolerances import NAIVE_ERROR_RATIO, assert_close, relative_error

IMPLS = ("auto", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def draw(
    length: int, *, b: int = 2, d: int = 6, w: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    torch.manual_seed(length)
    shapes = {
        "x": (b, length, d),
        "weight": (d, w),
        "bias": (d,),
        "initial_states": (b, w - 1, d),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def plain(inputs: dict[str, Tensor]) -> Tensor:
    """Convolve by ``F.conv1d`` with the initial states in front."""
    padded = torch.cat([inputs["initial_states"], inputs["x"]], 1).transpose(1, 2)
    y = F.conv1d(padded, inputs["weight"].unsqueeze(1), inputs["bias"], groups=padded.shape[1])
    return F.silu(y.transpose(1, 2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "w"), [(1, 4), (2, 4), (3, 4), (65, 4), (20, 1), (33, 2)])
def test_equals_torch_convolution(length: int, w: int, dtype: torch.dtype, impl: Any) -> None:
    narrow = draw(length, w=w, dtype=dtype)
    exact = leaves({k: v.double() for k, v in narrow.items()})
    ours = leaves(narrow)
    expected = plain(exact)
    actual = causal_conv1d(**ours, activation="silu", impl=impl)
    assert actual.dtype == dtype
    assert_close(actual, expected.to(dtype))
    for got, wanted in zip(gradients((actual,), ours), gradients((expected,), exact), strict=True):
        assert_close(got, wanted.to(dtype), gradient=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_bias_activation_or_initial_state(impl: Any) -> None:
    inputs = draw(50)
    inputs["initial_states"] = torch.zeros(2, 3, 6)
    inputs["bias"] = torch.zeros(6)
    y = causal_conv1d(inputs["x"], inputs["weight"], impl=impl)
    assert_close(F.silu(y), plain(inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_slice_of_a_projection_is_accepted(impl: Any) -> None:
    """The block passes columns of one fused projection: strided and not contiguous."""
    inputs = draw(40)
    fused = torch.randn(2, 40, 11)
    sliced = fused[:, :, 3:9]
    args = (inputs["weight"], inputs["bias"])
    expected = causal_conv1d(sliced.contiguous(), *args, impl=impl)
    assert_close(causal_conv1d(sliced, *args, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_in_a_row_equal_documents_alone(impl: Any) -> None:
    inputs = draw(40, b=1)
    ids = torch.tensor([0] * 2 + [1] * 1 + [0] * 2 + [5] * 30 + [1] * 5).unsqueeze(0)
    y, final = causal_conv1d(
        **inputs, activation="silu", seq_idx=ids, return_final_states=True, impl=impl
    )
    for start, stop in ((0, 2), (2, 3), (3, 5), (5, 35), (35, 40)):
        alone = {**inputs, "x": inputs["x"][:, start:stop]}
        if start:
            alone["initial_states"] = torch.zeros(1, 3, 6)
        y_alone, final_alone = causal_conv1d(
            **alone, activation="silu", return_final_states=True, impl=impl
        )
        assert_close(y[:, start:stop], y_alone, what=f"document at {start}")
    assert_close(final, final_alone)


def test_another_document_cannot_leak_even_infinities() -> None:
    inputs = draw(12, b=1)
    ids = torch.tensor([0] * 6 + [1] * 6).unsqueeze(0)
    clean = causal_conv1d(**inputs, seq_idx=ids)
    inputs["x"][:, :6] = torch.inf
    assert_close(causal_conv1d(**inputs, seq_idx=ids)[:, 6:], clean[:, 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", None])
def test_cpu_path_matches_reference_on_packed_rows(dtype: torch.dtype, activation: Any) -> None:
    narrow = draw(64, dtype=dtype)
    ids = seq_idx(2, 64)
    results = []
    for impl in IMPLS:
        inputs = leaves(narrow)
        y, final = causal_conv1d(
            **inputs, activation=activation, seq_idx=ids, return_final_states=True, impl=impl
        )
        results.append(((y, final), gradients((y, final), inputs)))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], gradient=True)


def test_gradient_passed_in_is_not_changed() -> None:
    inputs = leaves(draw(16))
    y = causal_conv1d(**inputs, seq_idx=seq_idx(2, 16))
    dy = torch.randn_like(y)
    kept = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_error_is_that_of_plain_bfloat16(impl: Any) -> None:
    narrow = draw(200, d=32, dtype=torch.bfloat16)
    truth = plain({k: v.double() for k, v in narrow.items()})
    padded = torch.cat([narrow["initial_states"], narrow["x"]], 1)
    total = narrow["bias"] + sum(padded[:, k : k + 200] * narrow["weight"][:, k] for k in range(4))
    naive = F.silu(total)
    ours = causal_conv1d(**narrow, activation="silu", impl=impl)
    assert relative_error(ours, truth) <= NAIVE_ERROR_RATIO * relative_error(naive, truth)


@pytest.mark.parametrize("packed", [False, True])
def test_reference_passes_gradcheck(packed: bool) -> None:
    drawn = {k: v.double() for k, v in draw(7, b=1, d=2).items()}
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, 0]]) if packed else None

    def function(*tensors: Tensor) -> Any:
        return causal_conv1d(
            **dict(zip(drawn, tensors, strict=True)),
            activation="silu",
            seq_idx=ids,
            return_final_states=True,
        )

    assert torch.autograd.gradcheck(function, tuple(leaves(drawn).values()))


@pytest.mark.parametrize("silu", [False, True])
def test_cpu_path_gradient_follows_finite_differences(silu: bool) -> None:
    drawn = {k: v.double() for k, v in draw(7, b=2, d=2).items()}
    document = document_ordinals(torch.tensor([[0, 0, 1, 1, 1, 0, 0], [3, 3, 3, 3, 3, 3, 3]]))

    def function(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor) -> Tensor:
        return causal_conv1d_cpu(
            x, weight, bias, silu=silu, initial_states_bwd=initial, document_bl=document
        )

    # The path sums gradients in float32 whatever the inputs.
    assert torch.autograd.gradcheck(
        function, tuple(leaves(drawn).values()), eps=1e-3, atol=1e-3, rtol=1e-3, nondet_tol=1e-6
    )


@pytest.mark.parametrize("splits", [(1,), (2,), (17,), (1, 2, 3, 38)])
def test_continuing_equals_the_whole(splits: tuple[int, ...]) -> None:
    inputs = draw(40)
    whole, final = causal_conv1d(**inputs, return_final_states=True)
    state, parts = inputs["initial_states"], []
    for start, stop in zip((0, *splits), (*splits, 40), strict=True):
        part = {**inputs, "x": inputs["x"][:, start:stop], "initial_states": state}
        y, state = causal_conv1d(**part, return_final_states=True)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("w", [1, 2, 4])
def test_token_by_token_equals_the_whole(dtype: torch.dtype, w: int) -> None:
    inputs = draw(20, dtype=dtype, w=w)
    whole, final = causal_conv1d(**inputs, activation="silu", return_final_states=True)
    state = inputs["initial_states"]
    before = state.clone()
    for t in range(20):
        y, new = causal_conv1d_update(
            inputs["x"][:, t], state, inputs["weight"], inputs["bias"], activation="silu"
        )
        assert_close(y, whole[:, t], what=f"token {t}")
        if t == 0:
            assert torch.equal(state, before)
        state = new
    assert_close(state, final) if w > 1 else None


def test_final_state_owns_its_memory() -> None:
    x = torch.randn(1, 1000, 4)
    _, final = causal_conv1d(x, torch.randn(4, 4), return_final_states=True)
    assert final.untyped_storage().nbytes() == 3 * 4 * 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.randn(5, 4)}, r"weight has shape \(5, 4\); expected \(d=6, w\)"),
        ({"initial_states": torch.randn(2, 4, 6)}, "w-1=3"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_misuse_is_named(change: dict[str, Any], text: str) -> None:
    inputs: dict[str, Any] = draw(8)
    with pytest.raises(ValueError, match=text):
        causal_conv1d(**{**inputs, **change})


def test_update_misuse_is_named() -> None:
    weight = torch.randn(6, 4)
    with pytest.raises(ValueError, match="state has shape"):
        causal_conv1d_update(torch.randn(2, 6), torch.randn(2, 6, 3), weight)
    with pytest.raises(ValueError, match="no Triton kernel"):
        causal_conv1d_update(torch.randn(2, 6), torch.randn(2, 3, 6), weight, impl="triton")
