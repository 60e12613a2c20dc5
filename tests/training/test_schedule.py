"""The learning rate at points worked out by hand, and without jumps between them."""

from __future__ import annotations

import itertools
import math

import pytest

from mamba2lm.schema import ConfigError
from mamba2lm.training.schedule import ScheduleConfig, ScheduleKind, learning_rate_ratio


def ratios(config: ScheduleConfig, max_steps: int) -> list[float]:
    return [learning_rate_ratio(config, step, max_steps) for step in range(max_steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for kind in ScheduleKind:
        config = ScheduleConfig(kind, warmup_steps=4, min_ratio=0.1)
        assert ratios(config, 20)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_passes_points_worked_out_by_hand() -> None:
    config = ScheduleConfig(ScheduleKind.cosine, warmup_steps=4, min_ratio=0.2)
    # 16 steps of decay: a quarter, half and three quarters of the way at 4, 8 and 12 of them.
    got = ratios(config, 20)
    half_way = 1.0 - 0.8 * 0.5
    assert got[4 + 7] == pytest.approx(half_way)
    assert got[4 + 3] == pytest.approx(1.0 - 0.8 * (0.5 - 0.5 * math.sqrt(0.5)))
    assert got[4 + 11] == pytest.approx(1.0 - 0.8 * (0.5 + 0.5 * math.sqrt(0.5)))
    assert got[19] == pytest.approx(0.2)


def test_wsd_stays_at_the_peak_then_falls_linearly() -> None:
    config = ScheduleConfig(ScheduleKind.wsd, warmup_steps=2, min_ratio=0.0, decay_fraction=0.25)
    got = ratios(config, 20)
    assert got[2:15] == [1.0] * 13
    assert got[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_with_a_decay_longer_than_what_follows_warmup_begins_after_warmup() -> None:
    config = ScheduleConfig(ScheduleKind.wsd, warmup_steps=6, min_ratio=0.5, decay_fraction=1.0)
    assert ratios(config, 10) == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 0.875, 0.75, 0.625, 0.5]
    )


def test_constant_stays_at_the_peak() -> None:
    config = ScheduleConfig(ScheduleKind.constant, warmup_steps=3)
    assert ratios(config, 12)[3:] == [1.0] * 9


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize("warmup", [0, 1, 50])
def test_schedules_move_in_small_steps(kind: ScheduleKind, warmup: int) -> None:
    config = ScheduleConfig(kind, warmup_steps=warmup, min_ratio=0.1, decay_fraction=0.2)
    got = ratios(config, 1000)
    steepest = max(abs(after - before) for before, after in itertools.pairwise(got))
    assert steepest <= max(1 / max(warmup, 1), 0.9 / 200) + 1e-12
    assert all(0 < ratio <= 1 for ratio in got)
    if kind is not ScheduleKind.constant:
        assert got[-1] == pytest.approx(0.1)


def test_steps_past_the_end_stay_at_the_minimum() -> None:
    config = ScheduleConfig(ScheduleKind.cosine, warmup_steps=1, min_ratio=0.1)
    assert learning_rate_ratio(config, 500, 20) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes", [{"warmup_steps": -1}, {"min_ratio": 1.5}, {"decay_fraction": -0.1}]
)
def test_impossible_values_are_named(changes: dict[str, float]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ConfigError, match=rf"schedule\.{name}={value}"):
        ScheduleConfig(**changes).validate()  # type: ignore[arg-type]
