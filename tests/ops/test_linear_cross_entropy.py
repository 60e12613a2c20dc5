"""The head and its loss against ``F.cross_entropy`` on materialised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops import linear_cross_entropy
from mamba2lm.ops.linear_cross_entropy import chunked

from .inputs import gradients, leaves
from .tolerances import NAIVE_ERROR_RATIO, assert_close

REDUCTIONS = ("mean", "sum", "none")


def draw(dtype: torch.dtype = torch.float64, v: int = 13) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = {"hidden": torch.randn(3, 5, 8).to(dtype), "weight": torch.randn(v, 8).to(dtype)}
    labels = torch.randint(0, 11, (3, 5))
    labels[0, 1], labels[2, 4] = -100, -100
    return tensors, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("vocab_size", [None, 11])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch(reduction: Any, vocab_size: int | None, dtype: torch.dtype) -> None:
    tensors, labels = draw(dtype)
    ours, theirs = leaves(tensors), leaves(tensors)
    logits = theirs["hidden"] @ theirs["weight"][:vocab_size].t()
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=-100
    )
    actual = linear_cross_entropy(**ours, labels=labels, vocab_size=vocab_size, reduction=reduction)
    assert actual.dtype == dtype
    assert_close(actual, expected.view(actual.shape))
    expected = expected.view(actual.shape)
    assert_close(gradients((actual,), ours), gradients((expected,), theirs), gradient=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 60])
def test_single_losses_without_gradients_hold_few_logits(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", elements)
    tensors, labels = draw(dtype)
    widest: list[int] = []
    reference = chunked.linear_cross_entropy_reference

    def watch(hidden_td: Tensor, *rest: Any, **named: Any) -> Tensor:
        widest.append(hidden_td.shape[0])
        return reference(hidden_td, *rest, **named)

    monkeypatch.setattr(chunked, "linear_cross_entropy_reference", watch)
    arguments: dict[str, Any] = {"labels": labels, "vocab_size": 11, "reduction": "none"}
    actual = linear_cross_entropy(**tensors, **arguments)
    assert max(widest) == max(1, elements // 11)
    assert sum(widest) == 15
    torch.testing.assert_close(
        actual, linear_cross_entropy(**tensors, **arguments, impl="reference")
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("elements", [1, 22, 60])
def test_chunks_of_tokens_equal_the_reference(
    reduction: Any, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", elements)  # 1, 2 and 5 tokens a chunk
    tensors, labels = draw(torch.float32)
    ours, theirs = leaves(tensors), leaves(tensors)
    arguments: dict[str, Any] = {"labels": labels, "vocab_size": 11, "reduction": reduction}
    actual = linear_cross_entropy(**ours, **arguments)
    expected = linear_cross_entropy(**theirs, **arguments, impl="reference")
    assert_close(actual, expected)
    found = gradients((3 * actual,), ours)
    assert_close(found, gradients((3 * expected,), theirs), gradient=True)


def test_bfloat16_gradients_are_those_of_the_reference() -> None:
    tensors, labels = draw(torch.bfloat16, v=300)
    exact = leaves({name: tensor.double() for name, tensor in tensors.items()})
    ours, plain = leaves(tensors), leaves(tensors)
    truth = gradients((linear_cross_entropy(**exact, labels=labels),), exact)
    found = gradients((linear_cross_entropy(**ours, labels=labels),), ours)
    naive = gradients((linear_cross_entropy(**plain, labels=labels, impl="reference"),), plain)
    for mine, plainly, exactly in zip(found, naive, truth, strict=True):
        error, allowed = ((g.double() - exactly).norm() for g in (mine, plainly))
        assert 0 < error <= NAIVE_ERROR_RATIO * allowed


def test_autocast_decides_the_dtype_of_the_product() -> None:
    tensors, labels = draw(torch.float32)
    low = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**tensors, labels=labels)
    assert loss.dtype == torch.float32
    assert loss.item() == linear_cross_entropy(**low, labels=labels).item()
    assert loss.item() != linear_cross_entropy(**tensors, labels=labels).item()


def test_nothing_is_kept_without_gradients() -> None:
    tensors, labels = draw(torch.float32)
    inputs = leaves(tensors)
    with torch.no_grad():
        loss = linear_cross_entropy(**inputs, labels=labels)
    assert not loss.requires_grad
    inputs["weight"].requires_grad_(False)
    linear_cross_entropy(**inputs, labels=labels).backward()
    assert inputs["hidden"].grad is not None
    assert inputs["weight"].grad is None


def test_padded_rows_never_enter_the_softmax() -> None:
    tensors, labels = draw()
    before = linear_cross_entropy(**tensors, labels=labels, vocab_size=11)
    tensors["weight"][11:] = 1e6
    poisoned = leaves(tensors)
    loss = linear_cross_entropy(**poisoned, labels=labels, vocab_size=11)
    assert_close(loss, before)
    loss.backward()
    assert poisoned["weight"].grad is not None
    assert poisoned["weight"].grad[11:].abs().max().item() == 0
    assert poisoned["weight"].grad[:11].abs().min().item() > 0


def test_no_labels_give_zero_with_a_graph() -> None:
    tensors, labels = draw()
    inputs = leaves(tensors)
    loss = linear_cross_entropy(**inputs, labels=torch.full_like(labels, -100))
    assert loss.item() == 0
    loss.backward()
    assert inputs["hidden"].grad is not None
    assert torch.isfinite(inputs["hidden"].grad).all()


def test_mean_counts_labels_that_count() -> None:
    tensors, labels = draw()
    each = linear_cross_entropy(**tensors, labels=labels, reduction="none")
    assert each.shape == labels.shape
    assert each[0, 1].item() == 0
    assert_close(linear_cross_entropy(**tensors, labels=labels), each.sum() / 13)


def test_bfloat16_error_is_that_of_plain_bfloat16() -> None:
    tensors, labels = draw(torch.bfloat16)
    exact = linear_cross_entropy(**{k: v.double() for k, v in tensors.items()}, labels=labels)
    logits = (tensors["hidden"] @ tensors["weight"].t()).flatten(0, 1)
    naive = F.cross_entropy(logits, labels.flatten())
    ours = linear_cross_entropy(**tensors, labels=labels)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= NAIVE_ERROR_RATIO * (naive - exact).abs()


def test_passes_gradcheck() -> None:
    tensors, labels = draw()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, r=reduction: linear_cross_entropy(
                h, w, labels, vocab_size=11, reduction=r
            ),
            tuple(leaves(tensors).values()),
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.randn(13, 7)}, r"weight has shape \(13, 7\); expected \(v, d=8\)"),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, r"labels has shape \(3, 4\)"),
        ({"vocab_size": 14}, "vocab_size=14"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_misuse_is_named(change: dict[str, Any], text: str) -> None:
    tensors, labels = draw()
    arguments: dict[str, Any] = {**tensors, "labels": labels}
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(**{**arguments, **change})


def test_a_factor_of_the_loss_is_not_rounded() -> None:
    tensors, labels = draw(torch.bfloat16, v=300)
    plain, thirds = leaves(tensors), leaves(tensors)
    found = gradients((linear_cross_entropy(**plain, labels=labels),), plain)[0]
    third = gradients((linear_cross_entropy(**thirds, labels=labels) / 3,), thirds)[0]
    ratio = (third.double() * found).sum() / found.double().square().sum()
    assert abs(3 * ratio.item() - 1) < 5e-4  # a third in bfloat16 is wrong by 2e-3
