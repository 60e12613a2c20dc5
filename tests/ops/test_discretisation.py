"""Step sizes and document boundaries."""

from __future__ import annotations

import math

import pytest
import torch

from mamba2lm.ops.discretisation import step_sizes
from mamba2lm.ops.documents import document_bounds, document_ordinals, document_starts

from .tolerances import assert_close


@pytest.mark.parametrize("value", [-80.0, -40.0, -17.5, -3.0, 0.0, 5.0, 19.0, 25.0])
def test_softplus_keeps_its_relative_precision(value: float) -> None:
    computed = step_sizes(torch.tensor([value]), dt_softplus=True).item()
    assert math.isclose(computed, math.log1p(math.exp(value)), rel_tol=1e-6)


def test_order_is_bias_then_softplus_then_limit() -> None:
    torch.manual_seed(0)
    dt, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = torch.log1p(torch.exp(dt + bias))
    assert_close(step_sizes(dt, dt_bias=bias, dt_softplus=True), expected)
    limited = step_sizes(dt, dt_bias=bias, dt_softplus=True, dt_limit=(0.4, 1.1))
    assert_close(
        limited,
        torch.minimum(torch.maximum(expected, expected.new_tensor(0.4)), expected.new_tensor(1.1)),
    )
    assert limited.min().item() == 0.4


def test_negative_steps_are_raised_to_the_limit() -> None:
    assert step_sizes(torch.tensor([-1.0, 0.5])).tolist() == [0.0, 0.5]


def test_narrow_steps_become_float32() -> None:
    assert step_sizes(torch.randn(3).bfloat16()).dtype == torch.float32
    assert step_sizes(torch.randn(3).double()).dtype == torch.float64


def test_returning_ids_start_new_documents() -> None:
    ids = torch.tensor([[7, 7, 2, 7, 7, 7], [0, 0, 0, 0, 0, 0]])
    assert document_ordinals(ids).tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]
    assert document_starts(ids).tolist() == [
        [False, False, True, True, False, False],
        [False] * 6,
    ]


def test_bounds_lay_rows_end_to_end() -> None:
    ids = torch.tensor([[7, 7, 2, 7], [0, 0, 0, 0], [0, 1, 1, 1]])
    bounds = document_bounds(document_ordinals(ids))
    assert bounds.tolist() == [0, 2, 3, 4, 8, 9, 12]
    assert bounds.dtype == torch.int32


@pytest.mark.gpu
def test_ordinals_are_remembered_until_the_ids_change() -> None:
    ids = torch.tensor([[3, 3, 5, 3]], device="cuda")
    first = document_ordinals(ids)
    assert document_ordinals(ids) is first
    ids[0, 1] = 4
    assert document_ordinals(ids).tolist() == [[0, 1, 2, 3]]
    assert document_ordinals(ids.clone()).tolist() == [[0, 1, 2, 3]]
    assert first.tolist() == [[0, 0, 1, 2]]
