"""Shuffled epochs and exact mixtures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mamba2lm.data.sampler import EpochOrder, Mixture, block_counts, generator


def test_generators_differ_by_every_coordinate() -> None:
    draws = {
        tuple(generator(*arguments).integers(2**62, size=2).tolist())
        for arguments in [
            (0, "a"),
            (1, "a"),
            (0, "b"),
            (0, "a", 1),
            (0, "a", 2),
            (0, "a", 1, 2),
            (-1, "a"),
        ]
    }
    assert len(draws) == 7


def test_every_epoch_visits_every_window_once_in_its_own_order() -> None:
    order = EpochOrder(3, 0, 50, 16)
    epochs = [[order.window(epoch * 50 + i) for i in range(50)] for epoch in range(4)]
    shifts = set()
    for epoch in epochs:
        assert sorted(window for window, _ in epoch) == list(range(50))
        assert len({shift for _, shift in epoch}) == 1
        shifts.add(epoch[0][1])
    assert all(0 <= shift < 16 for shift in shifts)
    assert len(shifts) > 1
    assert len({tuple(window for window, _ in epoch) for epoch in epochs}) == 4


def test_any_sample_can_be_asked_for_first() -> None:
    straight = EpochOrder(3, 1, 20, 8)
    expected = [straight.window(index) for index in range(100)]
    jumping = EpochOrder(3, 1, 20, 8)
    for index in np.random.default_rng(0).permutation(100):
        assert jumping.window(int(index)) == expected[index]
    other_source = EpochOrder(3, 2, 20, 8)
    assert [other_source.window(index) for index in range(100)] != expected


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], [1]),
        ([2.0, 2.0], [1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1, 2], [1, 2]),
        ([0.5, 0.3333, 0.1667], [5000, 3333, 1667]),
    ],
)
def test_blocks_have_the_exact_proportions(weights: list[float], counts: list[int]) -> None:
    assert block_counts(weights) == counts


def test_awkward_weights_are_rounded_to_a_long_block() -> None:
    weights = [np.pi, np.e, 1e-9]
    counts = np.asarray(block_counts(weights))
    assert counts.min() >= 1
    assert 25_200 <= counts.sum() <= 25_203
    np.testing.assert_allclose(counts / counts.sum(), np.asarray(weights) / sum(weights), atol=1e-4)


def test_mixture_draws_each_source_in_sequence_and_proportion() -> None:
    mixture = Mixture(5, [0.7, 0.2, 0.1])
    drawn = [mixture.source(index) for index in range(1000)]
    assert Counter(source for source, _ in drawn) == {0: 700, 1: 200, 2: 100}
    for source in range(3):
        numbers = [number for chosen, number in drawn if chosen == source]
        assert numbers == list(range(len(numbers)))
    blocks = {tuple(source for source, _ in drawn[i : i + 10]) for i in range(0, 1000, 10)}
    assert len(blocks) > 50
    again = Mixture(5, [0.7, 0.2, 0.1])
    for index in (999, 3, 500, 501, 4):
        assert again.source(index) == drawn[index]
