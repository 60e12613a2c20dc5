from __future__ import annotations

import math

import pytest
import torch

from mamba2lm.inference import Sampler, SamplingConfig
from mamba2lm.schema import ConfigError

# Probabilities 0.5, 0.25, 0.15, 0.1 in an order that is not sorted.
PROBABILITIES = [0.15, 0.5, 0.1, 0.25]
LOGITS = torch.tensor([[math.log(p) + 3.0 for p in PROBABILITIES]], dtype=torch.float64)


def distribution(seen: list[int] | None = None, **fields: float) -> list[float]:
    config = SamplingConfig(**{"temperature": 1.0, **fields})  # type: ignore[arg-type]
    config.validate()
    return Sampler(config).distribution(LOGITS, [seen or []])[0].tolist()


def normalised(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def test_plain_sampling_keeps_the_models_distribution() -> None:
    assert distribution() == pytest.approx(PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    expected = normalised([p ** (1 / temperature) for p in PROBABILITIES])
    assert distribution(temperature=temperature) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_a_vanishing_temperature_takes_the_most_likely(temperature: float) -> None:
    assert distribution(temperature=temperature) == [0, 1, 0, 0]


def test_top_k_keeps_the_k_most_likely() -> None:
    assert distribution(top_k=2) == pytest.approx(normalised([0, 0.5, 0, 0.25]))
    assert distribution(top_k=100) == pytest.approx(PROBABILITIES)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # 0.5 + 0.25 reach 0.7; with 0.8 the third is needed too.
    assert distribution(top_p=0.7) == pytest.approx(normalised([0, 0.5, 0, 0.25]))
    assert distribution(top_p=0.8) == pytest.approx(normalised([0.15, 0.5, 0, 0.25]))
    assert distribution(top_p=0.01) == pytest.approx([0, 1, 0, 0])


def test_min_p_drops_what_is_unlikely_beside_the_most_likely() -> None:
    # 0.25 of 0.5 is 0.125: only 0.1 lies below.
    assert distribution(min_p=0.25) == pytest.approx(normalised([0.15, 0.5, 0, 0.25]))
    assert distribution(min_p=1.0) == pytest.approx([0, 1, 0, 0])


def test_filters_apply_after_the_temperature_and_one_after_another() -> None:
    # At temperature 0.5 the squares: 0.0225, 0.25, 0.01, 0.0625 of 0.345. The two best of the three
    # that top_k leaves reach 0.9 of them.
    expected = normalised([0, 0.25, 0, 0.0625])
    assert distribution(temperature=0.5, top_k=3, top_p=0.9) == pytest.approx(expected)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0]], dtype=torch.float64)
    sampler = Sampler(SamplingConfig(temperature=1.0, repetition_penalty=2.0))
    found = sampler.distribution(logits, [{0, 1}])[0]
    expected = torch.tensor([1.0, -2.0, 0.5, -3.0], dtype=torch.float64).softmax(dim=-1)
    torch.testing.assert_close(found, expected)


def test_repetition_penalty_of_rows_that_have_seen_different_numbers_of_ids() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.float64)
    seen: list[set[int]] = [{1, 4, 5}, set(), {2}]
    sampler = Sampler(SamplingConfig(temperature=1.0, repetition_penalty=1.7))
    together = sampler.distribution(logits, seen)
    for i, ids in enumerate(seen):
        expected = logits[i].clone()
        for token in ids:
            expected[token] *= 1.7 if expected[token] < 0 else 1 / 1.7
        torch.testing.assert_close(together[i], expected.softmax(dim=-1))


def test_greedy_choice_respects_the_repetition_penalty() -> None:
    sampler = Sampler(SamplingConfig(temperature=0.0, repetition_penalty=3.0))
    logits = torch.tensor([[2.0, 1.0, 0.1]])
    assert sampler(logits, [[]], [torch.Generator()]).tolist() == [0]
    assert sampler(logits, [[0]], [torch.Generator()]).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    draws = 20_000
    sampler = Sampler(SamplingConfig(temperature=1.0, top_p=0.85))
    generator = torch.Generator().manual_seed(5)
    tokens = sampler(LOGITS.expand(draws, -1), [[]] * draws, [generator] * draws)
    share = torch.bincount(tokens, minlength=4) / draws
    expected = torch.tensor(normalised([0.15, 0.5, 0, 0.25]))
    assert share[2] == 0
    # Five standard deviations of a share of 20,000 draws.
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 50)
    sampler = Sampler(SamplingConfig(temperature=1.0))

    def draw(rows: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        steps = [sampler(logits[rows], [[]] * len(rows), generators) for _ in range(20)]
        return torch.stack(steps).T.tolist()

    together = draw([0, 1, 2, 3])
    assert together == [draw([row])[0] for row in range(4)]
    assert draw([3, 1]) == [together[3], together[1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", ["a", ""]),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    config = SamplingConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^sampling\.{field}="):
        config.validate()
