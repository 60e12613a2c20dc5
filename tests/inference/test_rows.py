"""Rows' states side by side: what goes in comes out, wherever it has been moved."""

from __future__ import annotations

import pytest
import torch

from mamba2lm.inference.rows import Read, Rows, _runs
from mamba2lm.models import ModelState
from tests.inference import helpers

PATTERNS = [*helpers.PATTERNS, "MSM"]


def read(pattern: str, rows: int, length: int = 9) -> ModelState:
    """Return what a model has read of random rows."""
    built = helpers.model(pattern)
    torch.manual_seed(length)
    ids_bl = torch.randint(0, 500, (rows, length))
    with torch.inference_mode():
        state = built(ids_bl, state=built.new_state(rows)).state
    assert state is not None
    return state


def same(mine: ModelState, theirs: ModelState) -> bool:
    return all(
        torch.equal(a[name], b[name])
        for a, b in zip(mine.layers, theirs.layers, strict=True)
        for name in a
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_zeros_have_read_nothing(pattern: str) -> None:
    built = helpers.model(pattern)
    rows = Rows.like(built.new_state(0), 3)
    expected = built.new_state(3)
    assert same(rows.state, expected)
    assert rows.nbytes == expected.nbytes == rows.state.nbytes
    for mine, theirs in zip(rows.state.layers, expected.layers, strict=True):
        assert type(mine) is type(theirs)
        assert [mine[name].shape for name in mine] == [theirs[name].shape for name in theirs]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_come_and_move_and_grow(pattern: str) -> None:
    built = helpers.model(pattern)
    rows = Rows.like(built.new_state(0), 2).reserved(built, 16)
    group, single = read(pattern, 3), read(pattern, 1, 5)
    with torch.inference_mode():
        rows.put(0, [Read(group, 2), Read(single)])
        rows = rows.grown(4)
        rows.put(3, [Read(group, 1)])
        rows.move(3, 2, 9)
        rows.move(0, 3, 9)
    for row, (state, length) in enumerate(
        [(group.row(2, 9), 9), (single.row(0, 5), 5), (group.row(1, 9), 9), (group.row(2, 9), 9)]
    ):
        assert same(rows.taken(row, length), state)
        assert same(rows.state.row(row, length), state)


@pytest.mark.parametrize("pattern", ["MSM", "MA"])
def test_rows_that_lie_together_come_together(pattern: str) -> None:
    built = helpers.model(pattern)
    rows = Rows.like(built.new_state(0), 8).reserved(built, 16)
    group, other = read(pattern, 4), read(pattern, 2, 6)
    reads = [(group, 1), (group, 2), (group, 3), (other, 0), (other, 0), (group, 0), (other, 1)]
    with torch.inference_mode():
        rows.put(1, [Read(*each) for each in reads])
    for row, (state, index) in enumerate(reads, 1):
        length = 9 if state is group else 6
        assert same(rows.taken(row, length), state.row(index, length))
    assert list(_runs([Read(*each) for each in reads])) == [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert list(_runs([])) == []


def test_a_row_of_many_is_copied_and_one_alone_is_not() -> None:
    group, single = read("MA", 3), read("MA", 1)
    assert Read(single).alone() is single
    alone = Read(group, 1).alone()
    assert same(alone, group.row(1, 1 << 40))
    for layer in alone.layers:
        assert layer.batch == 1
        for name in layer:
            assert layer[name].untyped_storage().nbytes() == layer[name].nbytes


def test_groups_in_one_memory_are_copied_out() -> None:
    built = helpers.model("MSM")
    buffer = Rows.like(built.new_state(0), 4)
    batch = Rows.like(built.new_state(0, recurrent_dtype=torch.bfloat16), 5)
    first, second = read("MSM", 2), read("MSM", 4, 6)
    with torch.inference_mode():
        buffer.resized(2).fill(first)
        kept = buffer.resized(2).first(2)
        buffer.resized(4).fill(second)
        batch.put(4, [Read(kept, 1)])
        batch.put(0, [Read(buffer, 3)])
    assert same(kept.state, first)
    assert same(Read(kept, 1).alone(), first.row(1, 9))
    assert same(buffer.state, second)
    # In the batch's own dtype.
    for row, state in ((4, first.row(1, 9)), (0, second.row(3, 6))):
        found = batch.taken(row, 9)
        for mine, theirs in zip(found.layers, state.layers, strict=True):
            assert mine["ssm"].dtype == torch.bfloat16
            assert torch.equal(mine["ssm"], theirs["ssm"].bfloat16())
            assert torch.equal(mine["conv"], theirs["conv"])
