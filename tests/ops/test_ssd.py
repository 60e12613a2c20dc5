"""The duality: all forms are one function, in values, states and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import ssd
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.ssd import cpu as cpu_module
from mamba2lm.ops.ssd import reference as reference_module
from mamba2lm.ops.ssd.cpu import ssd_chunked_cpu
from mamba2lm.ops.ssd.reference import (
    pass_states,
    segsum,
    semiseparable_matrix,
    ssd_chunked,
    ssd_quadratic,
    ssd_recurrent,
)

from .inputs import LENGTHS, gradients, leaves, seq_idx, ssd_inputs
from .tolerances import NAIVE_ERROR_RATIO, assert_close, relative_error


def cpu_form(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Any:
    """Call the CPU path with the references' arguments: a step of 1 and x already scaled."""
    return ssd_chunked_cpu(x, torch.ones_like(log_a), log_a, B, C, **kwargs)


FORMS: dict[str, Callable[..., Any]] = {
    "recurrent": ssd_recurrent,
    "quadratic": ssd_quadratic,
    "chunked": ssd_chunked,
    "cpu": cpu_form,
}


def form_inputs(length: int, g: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    drawn = ssd_inputs(length, g=g, **kwargs)
    log_a = torch.nn.functional.softplus(drawn["dt"]) * drawn["A"]
    return {
        "x": drawn["x"],
        "log_a": log_a,
        "B": drawn["B"],
        "C": drawn["C"],
        "initial": drawn["initial_states"],
    }


def run_form(form: Callable[..., Any], inputs: dict[str, Tensor], document: Tensor | None) -> Any:
    return form(
        inputs["x"],
        inputs["log_a"],
        inputs["B"],
        inputs["C"],
        initial_states_bhpn=inputs["initial"],
        document_bl=document,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_forms_are_one_function(length: int, g: int, packed: bool) -> None:
    document = document_ordinals(seq_idx(2, length)) if packed else None
    results = {}
    for name, form in FORMS.items():
        inputs = leaves(form_inputs(length, g))
        outputs = run_form(form, inputs, document)
        results[name] = (outputs, gradients(outputs, inputs))
    for name in ("quadratic", "chunked", "cpu"):
        assert_close(results[name][0], results["recurrent"][0], what=name)
        assert_close(results[name][1], results["recurrent"][1], gradient=True, what=name)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1000])
@pytest.mark.parametrize("form", ["chunked", "cpu"])
def test_chunk_size_changes_nothing(form: str, chunk_size: int) -> None:
    inputs = form_inputs(100)
    document = document_ordinals(seq_idx(2, 100))
    expected = run_form(ssd_recurrent, inputs, document)
    actual = FORMS[form](
        inputs["x"],
        inputs["log_a"],
        inputs["B"],
        inputs["C"],
        initial_states_bhpn=inputs["initial"],
        document_bl=document,
        chunk_size=chunk_size,
    )
    assert_close(actual, expected)


def test_cpu_path_agrees_when_slabs_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "SLAB_ELEMENTS", 3 * 4 * 16 * 16)
    inputs = leaves(form_inputs(150, 2))
    outputs = FORMS["cpu"](
        inputs["x"],
        inputs["log_a"],
        inputs["B"],
        inputs["C"],
        initial_states_bhpn=inputs["initial"],
        chunk_size=16,
    )
    expected_inputs = leaves(form_inputs(150, 2))
    expected = run_form(ssd_recurrent, expected_inputs, None)
    assert_close(outputs, expected)
    assert_close(gradients(outputs, inputs), gradients(expected, expected_inputs), gradient=True)


def test_states_pass_through_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "MAX_CHUNKS_PER_PRODUCT", 4)
    torch.manual_seed(0)
    states = torch.randn(2, 75, 3, 2, 2, dtype=torch.float64)
    log_decay = -torch.rand(2, 75, 3, dtype=torch.float64)
    document = document_ordinals(seq_idx(2, 75))
    out = pass_states(states, log_decay, document)
    carry = torch.zeros_like(states[:, 0])
    for c in range(75):
        keep = torch.ones(2) if c == 0 else (document[:, c] == document[:, c - 1]).double()
        carry = log_decay[:, c, :, None, None].exp() * keep.view(2, 1, 1, 1) * carry + states[:, c]
        assert_close(out[:, c], carry, what=f"chunk {c}")


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(
    ("decays", "inputs", "outputs"),
    [
        ((0.9, 0.9, 0.9, 0.9), (1, 2, 3, 4), (1, 2.9, 5.61, 9.049)),
        ((2.0, 2.0, 2.0, 2.0), (1, 3, 5, 7), (1, 5, 15, 37)),
    ],
)
def test_worked_cases(
    form: str, decays: tuple[float, ...], inputs: tuple[int, ...], outputs: tuple[float, ...]
) -> None:
    x = torch.tensor(inputs, dtype=torch.float64).view(1, 4, 1, 1)
    log_a = torch.tensor(decays, dtype=torch.float64).log().view(1, 4, 1)
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    y, state = (
        FORMS[form](x, log_a, ones, ones, chunk_size=2)
        if form in ("chunked", "cpu")
        else (FORMS[form](x, log_a, ones, ones))
    )
    assert_close(y.flatten(), torch.tensor(outputs, dtype=torch.float64))
    assert_close(state.flatten(), torch.tensor(outputs[-1:], dtype=torch.float64))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_public_function_on_a_worked_case(impl: Any) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    ones = torch.ones(1, 4, 1, 1)
    y = ssd(x, torch.ones(1, 4, 1), torch.tensor([math.log(0.9)]), ones, ones, impl=impl)
    assert_close(y.flatten(), torch.tensor([1, 2.9, 5.61, 9.049]))


def test_semiseparable_matrix_of_three_steps() -> None:
    a1, a2 = 0.7, 0.4
    log_a = torch.tensor([0.3, a1, a2], dtype=torch.float64).log().view(1, 3, 1)
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    expected = torch.tensor([[1, 0, 0], [a1, 1, 0], [a2 * a1, a2, 1]], dtype=torch.float64)
    assert_close(semiseparable_matrix(log_a, ones, ones)[0, 0], expected)


def test_blocks_below_the_diagonal_have_low_rank() -> None:
    inputs = form_inputs(40, n=5)
    M = semiseparable_matrix(inputs["log_a"], inputs["B"], inputs["C"])
    for split in (10, 20, 33):
        assert torch.linalg.matrix_rank(M[..., split:, :split]).max().item() <= 5
    assert torch.linalg.matrix_rank(M).min().item() > 5


def test_matrix_times_input_is_the_output() -> None:
    inputs = form_inputs(65, 2)
    M = semiseparable_matrix(inputs["log_a"], inputs["B"], inputs["C"])
    y, _ = ssd_recurrent(inputs["x"], inputs["log_a"], inputs["B"], inputs["C"])
    assert_close(torch.einsum("bhts,bshp->bthp", M, inputs["x"]), y)


def test_segsum_equals_sums_of_segments() -> None:
    torch.manual_seed(0)
    log_a = torch.randn(2, 9, dtype=torch.float64)
    out = segsum(log_a)
    for t in range(9):
        for s in range(9):
            expected = log_a[:, s + 1 : t + 1].sum(1) if s <= t else torch.full((2,), -math.inf)
            assert_close(out[:, t, s], expected.double())


def full_call(inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    return ssd(**inputs, dt_softplus=True, return_final_states=True, **kwargs)


@pytest.mark.parametrize("packed", [False, True])
def test_reference_passes_gradcheck(packed: bool) -> None:
    drawn = ssd_inputs(7, b=1, h=2, p=2, g=2, n=2)
    names = list(drawn)
    ids = seq_idx(1, 7) if packed else None

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return full_call(dict(zip(names, tensors, strict=True)), seq_idx=ids, chunk_size=3)

    assert torch.autograd.gradcheck(function, tuple(leaves(drawn).values()))


@pytest.mark.parametrize("form", ["recurrent", "quadratic"])
def test_other_forms_pass_gradcheck(form: str) -> None:
    drawn = leaves(form_inputs(5, b=1, h=2, p=2, n=2))
    document = document_ordinals(torch.tensor([[0, 0, 1, 1, 0]]))

    def function(*tensors: Tensor) -> Any:
        return run_form(FORMS[form], dict(zip(drawn, tensors, strict=True)), document)

    assert torch.autograd.gradcheck(function, tuple(drawn.values()))


def test_cpu_path_passes_gradcheck() -> None:
    drawn = ssd_inputs(7, b=1, h=2, p=2, g=1, n=2)
    steps = torch.nn.functional.softplus(drawn["dt"])
    steps[0, 2, 0] = 0.4
    tensors = (drawn["x"], steps, steps * drawn["A"], drawn["B"], drawn["C"], drawn["D"])
    document = document_ordinals(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))

    def function(x: Tensor, dt: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Any:
        return ssd_chunked_cpu(
            x,
            dt,
            log_a,
            B,
            C,
            D_h=D,
            document_bl=document,
            chunk_size=3,
            initial_states_bhpn=drawn["initial_states"],
        )

    assert torch.autograd.gradcheck(function, tuple(t.clone().requires_grad_() for t in tensors))


def test_gradient_of_a_zero_step_is_exact() -> None:
    """A step clamped to 0 adds nothing to the state but still has a gradient."""
    results = []
    for impl in ("auto", "reference"):
        inputs = {k: v for k, v in ssd_inputs(9, dtype=torch.float32).items() if k != "dt_bias"}
        inputs["dt"] = inputs["dt"].abs()
        inputs["dt"][:, 4] = 0.0
        inputs = leaves(inputs)
        outputs = ssd(**inputs, return_final_states=True, impl=impl)
        results.append((outputs, gradients(outputs, inputs)))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], gradient=True)
    assert results[0][1][1][:, 4].abs().min().item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel_skip", [False, True])
def test_cpu_path_matches_reference(dtype: torch.dtype, per_channel_skip: bool) -> None:
    exact = ssd_inputs(150, h=4, p=16, g=2, n=16)
    if per_channel_skip:
        exact["D"] = torch.randn(4, 16, dtype=torch.float64)
    narrow = {k: v.to(dtype) for k, v in exact.items()}
    ids = seq_idx(2, 150)
    results = {}
    for name, inputs, impl in (
        ("exact", {k: v.double() for k, v in narrow.items()}, "reference"),
        ("reference", narrow, "reference"),
        ("cpu", narrow, "auto"),
    ):
        inputs = leaves(inputs)
        outputs = full_call(inputs, seq_idx=ids, impl=impl)
        results[name] = [*outputs, *gradients(outputs, inputs)]
    assert results["cpu"][0].dtype == dtype
    assert results["cpu"][1].dtype == torch.float32
    for what, ours, theirs, truth in zip(
        ["y", "final", *exact], results["cpu"], results["reference"], results["exact"], strict=True
    ):
        error, allowed = relative_error(ours, truth), relative_error(theirs, truth)
        # In float32 the logarithm of the step, added to every exponent, costs another bit.
        ratio = 3.0 if dtype == torch.float32 else NAIVE_ERROR_RATIO
        assert error <= max(ratio * allowed, 2 * torch.finfo(dtype).eps), (what, error, allowed)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bfloat16_error_is_that_of_plain_bfloat16(impl: Any) -> None:
    exact = ssd_inputs(256, h=4, p=32, n=32)
    narrow = {k: v.bfloat16() for k, v in exact.items() if k in ("x", "dt", "A", "B", "C", "D")}
    truth = ssd(**{k: v.double() for k, v in narrow.items()}, dt_softplus=True)
    ours = ssd(**narrow, dt_softplus=True, impl=impl)

    delta = torch.nn.functional.softplus(narrow["dt"].float())
    log_a = delta * narrow["A"].float()
    M = semiseparable_matrix(log_a, narrow["B"].float(), narrow["C"].float()).bfloat16()
    scaled = (narrow["x"].float() * delta.unsqueeze(-1)).bfloat16()
    skip = narrow["D"].unsqueeze(-1) * narrow["x"]
    naive = torch.einsum("bhts,bshp->bthp", M, scaled) + skip
    assert relative_error(ours, truth) <= NAIVE_ERROR_RATIO * relative_error(naive, truth)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_documents_in_a_row_equal_documents_alone(impl: Any) -> None:
    inputs = ssd_inputs(100, b=1, dtype=torch.float32)
    ids = torch.tensor([0] * 30 + [1] * 3 + [0] * 1 + [2] * 66).unsqueeze(0)
    y, final = full_call(inputs, seq_idx=ids, impl=impl)
    per_position = ("x", "dt", "B", "C", "z")
    for start, stop in ((0, 30), (30, 33), (33, 34), (34, 100)):
        alone = {k: v[:, start:stop] if k in per_position else v for k, v in inputs.items()}
        if start:
            alone["initial_states"] = torch.zeros_like(alone["initial_states"])
        y_alone, final_alone = full_call(alone, impl=impl)
        assert_close(y[:, start:stop], y_alone, what=f"document at {start}")
    assert_close(final, final_alone)


@pytest.mark.parametrize("splits", [(1,), (37,), (64,), (5, 6, 70), (99,)])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_continuing_equals_the_whole(splits: tuple[int, ...], impl: Any) -> None:
    inputs = ssd_inputs(100, g=2, dtype=torch.float32)
    whole, final = full_call(inputs, impl=impl)
    state, parts = inputs["initial_states"], []
    for start, stop in zip((0, *splits), (*splits, 100), strict=True):
        part = {
            k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()
        }
        y, state = full_call({**part, "initial_states": state}, impl=impl)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_extreme_decays_stay_finite_and_right(impl: Any) -> None:
    torch.manual_seed(0)
    inputs = {k: v for k, v in ssd_inputs(130, dtype=torch.float32).items() if k != "dt_bias"}
    # Per-step exponents from -1e-6 to -80, mixed within every chunk and constant per head.
    exponents = 10.0 ** (torch.rand(2, 130, 4) * 7.9 - 6)
    inputs["A"] = -torch.ones(4)
    exponents[..., 0], exponents[..., 1] = 80.0, 1e-6
    inputs["dt"] = exponents.clamp(max=80.0)
    exact = leaves({k: v.double() for k, v in inputs.items()})
    ours = leaves(inputs)
    expected = ssd(**exact, return_final_states=True, impl="reference")
    actual = ssd(**ours, return_final_states=True, impl=impl)
    pairs = [*zip(actual, expected, strict=True)]
    pairs += [*zip(gradients(actual, ours), gradients(expected, exact), strict=True)]
    for got, wanted in pairs:
        assert torch.isfinite(got).all()
        # A cumulative sum of 64 x 80 resolves exponents to 2^-11.
        assert relative_error(got, wanted) < 5e-4


def test_float32_is_float32_under_autocast() -> None:
    inputs = ssd_inputs(70, dtype=torch.float32)
    expected = full_call(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = full_call(inputs)
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_step_limit_is_honoured() -> None:
    inputs = ssd_inputs(20)
    clamped = {k: v for k, v in inputs.items() if k != "dt_bias"}
    raw = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])
    assert (raw < 0.5).any()
    assert (raw > 0.9).any()
    clamped["dt"] = raw.clamp(0.5, 0.9)
    assert_close(full_call(inputs, dt_limit=(0.5, 0.9)), ssd(**clamped, return_final_states=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dt": torch.randn(2, 8, 3)}, r"dt has shape \(2, 8, 3\); expected \(b=2, l=8, h=4\)"),
        ({"B": torch.randn(2, 8, 3, 5), "C": torch.randn(2, 8, 3, 5)}, "3 groups .* 4 heads"),
        ({"initial_states": torch.randn(2, 4, 3, 6)}, "initial_states has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit=\(1.0, 0.5\)"),
        ({"impl": "triton"}, "no Triton kernel"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
        ({"seq_idx": torch.zeros(2, 9, dtype=torch.long)}, "seq_idx has shape"),
    ],
)
def test_misuse_is_named(change: dict[str, Any], text: str) -> None:
    inputs: dict[str, Any] = ssd_inputs(8)
    with pytest.raises(ValueError, match=text):
        ssd(**{**inputs, **change})


def test_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        ssd(**ssd_inputs(0))
