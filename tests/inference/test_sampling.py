from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mamba2lm.inference import SamplingConfig
from mamba2lm.inference.sampling import (
    Drawn,
    Features,
    SamplingRows,
    _draw,
    _draw_by_kernel,
    draw,
    penalised,
    probabilities,
    uniform,
)
from mamba2lm.ops import kernels
from mamba2lm.schema import ConfigError
from tests.ops.kernel_runs import DEVICE, run_in_interpreter, runs_kernels

# Probabilities 0.5, 0.25, 0.15, 0.1 in an order that is not sorted.
PROBABILITIES = [0.15, 0.5, 0.1, 0.25]
LOGITS = torch.tensor([[math.log(p) + 3.0 for p in PROBABILITIES]], dtype=torch.float64)
SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(temperature=1.3, top_p=0.6),
    SamplingConfig(temperature=1.0, min_p=0.2),
    SamplingConfig(temperature=1.0, typical_p=0.5),
    SamplingConfig(temperature=0.9, repetition_penalty=1.7, top_k=90, top_p=0.9, min_p=0.01),
    SamplingConfig(temperature=2.0, top_k=30, typical_p=0.8),
    SamplingConfig(temperature=0.0, frequency_penalty=3.0),
    SamplingConfig(temperature=1.0, presence_penalty=2.0, top_k=1000),
]


def distribution(logits: Tensor, configs: list[SamplingConfig], seen: list[list[int]]) -> Tensor:
    """Return the probabilities that each row's token is drawn with; one-hot at temperature 0."""
    rows = rows_of(configs, vocab_size=logits.shape[1], seen=seen)
    scores = penalised(logits, rows)
    weight = probabilities(scores, rows, Features.of(configs, [], logits.shape[1]))
    best = torch.nn.functional.one_hot(scores.argmax(dim=-1), logits.shape[1]).double()
    cold = torch.tensor([[config.temperature == 0] for config in configs])
    return torch.where(cold, best, weight / weight.sum(dim=-1, keepdim=True))


def chances(seen: list[int] | None = None, **fields: float) -> list[float]:
    config = SamplingConfig(**{"temperature": 1.0, **fields})  # type: ignore[arg-type]
    config.validate()
    return distribution(LOGITS, [config], [seen or []])[0].tolist()


def normalised(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def rows_of(
    configs: list[SamplingConfig],
    seeds: list[int] | None = None,
    *,
    vocab_size: int,
    seen: list[list[int]] | None = None,
) -> SamplingRows:
    rows = SamplingRows.new(len(configs))
    rows.track(vocab_size)
    for i, config in enumerate(configs):
        rows.put(i, [(config, seeds[i] if seeds else i, seen[i] if seen else [])])
    return rows


def test_plain_sampling_keeps_the_models_distribution() -> None:
    assert chances() == pytest.approx(PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    expected = normalised([p ** (1 / temperature) for p in PROBABILITIES])
    assert chances(temperature=temperature) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-300])
def test_a_vanishing_temperature_takes_the_most_likely(
    temperature: float, dtype: torch.dtype
) -> None:
    config = SamplingConfig(temperature=temperature, top_p=0.9)
    assert distribution(LOGITS.to(dtype), [config], [[]])[0].tolist() == [0, 1, 0, 0]


def test_top_k_keeps_the_k_most_likely() -> None:
    assert chances(top_k=2) == pytest.approx(normalised([0, 0.5, 0, 0.25]))
    assert chances(top_k=100) == pytest.approx(PROBABILITIES)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # 0.5 + 0.25 reach 0.7; with 0.8 the third is needed too.
    assert chances(top_p=0.7) == pytest.approx(normalised([0, 0.5, 0, 0.25]))
    assert chances(top_p=0.8) == pytest.approx(normalised([0.15, 0.5, 0, 0.25]))
    assert chances(top_p=0.01) == pytest.approx([0, 1, 0, 0])


def test_min_p_drops_what_is_unlikely_beside_the_most_likely() -> None:
    # 0.25 of 0.5 is 0.125: only 0.1 lies below.
    assert chances(min_p=0.25) == pytest.approx(normalised([0.15, 0.5, 0, 0.25]))
    assert chances(min_p=1.0) == pytest.approx([0, 1, 0, 0])


def test_typical_keeps_what_is_as_surprising_as_expected() -> None:
    # Entropy 1.208 nats; surprises 1.897, 0.693, 2.303, 1.386: nearest 0.25, then 0.5.
    assert chances(typical_p=0.2) == pytest.approx([0, 0, 0, 1])
    assert chances(typical_p=0.7) == pytest.approx(normalised([0, 0.5, 0, 0.25]))


def test_filters_apply_after_the_temperature_and_one_after_another() -> None:
    # At temperature 0.5 the squares: 0.0225, 0.25, 0.01, 0.0625 of 0.345. The two best of the three
    # that top_k leaves reach 0.9 of them.
    expected = normalised([0, 0.25, 0, 0.0625])
    assert chances(temperature=0.5, top_k=3, top_p=0.9) == pytest.approx(expected)


def test_presence_and_frequency_penalties_count_what_was_drawn() -> None:
    config = SamplingConfig(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    rows = rows_of([config], vocab_size=3, seen=[[0, 1]])  # the prompt does not count
    features = Features.of([config], [None], 3)
    drawn = [int(draw(logits, rows, features).token_b) for _ in range(6)]
    # Scores by hand: 1.00 .90 .0 | .25 .90 .0 | .25 .15 .0 | .0 .15 .0 | .0 -.10 .0 | -.25 -.10 .0
    assert drawn == [0, 1, 0, 1, 0, 2]


def through_transformers(logits: Tensor, config: SamplingConfig, seen: list[int]) -> Tensor:
    """Return one row's probabilities by the processors of transformers."""
    steps = LogitsProcessorList()
    if config.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(MinPLogitsWarper(config.min_p))
    if config.typical_p < 1:
        steps.append(TypicalLogitsWarper(config.typical_p))
    return steps(torch.tensor([seen]), logits[None].double()).softmax(dim=-1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_different_settings_agree_with_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    configs = [c for c in SETTINGS if c.temperature and not c.presence_penalty]
    logits = (torch.randn(len(configs), 300) * 3).to(dtype)
    seen = [torch.randint(0, 300, (7 * i + 1,)).tolist() for i in range(len(configs))]
    found = distribution(logits, configs, seen)
    for i, config in enumerate(configs):
        expected = through_transformers(logits[i], config, seen[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-9, msg=str(config))
        assert (found[i] > 0).sum() == (expected > 0).sum()


def test_equal_logits_share_their_fate() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    found = distribution(logits, [SamplingConfig(temperature=1.0, top_k=2)], [[]])[0]
    assert (found > 0).tolist() == [False, True, True, True, True, False]


def test_uniform_numbers_are_splitmix64() -> None:
    def reference(seed: int, index: int) -> float:
        mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

        def mix(z: int) -> int:
            z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
            return z ^ z >> 31

        return (mix((mix(seed + golden & mask) + index * golden) & mask) >> 11) * 2.0**-53

    pairs = [(0, 0), (1, 0), (0, 1), (-5, 3), (2**63 - 1, 10**6), (-(2**63), 2**40)]
    seed_b, index_b = torch.tensor(pairs).unbind(dim=1)
    assert uniform(seed_b, index_b).tolist() == [reference(*pair) for pair in pairs]


def test_uniform_numbers_are_uniform_over_seeds_and_over_indices() -> None:
    count = 40_000
    many, one = torch.arange(count), torch.full((count,), 7)
    for numbers in (uniform(many, one), uniform(one, many)):
        assert 0 <= numbers.min() < numbers.max() < 1
        histogram = torch.histc(numbers.float(), bins=20, min=0, max=1)
        # Five standard deviations of a bin's count.
        assert (histogram - count / 20).abs().max() < 5 * math.sqrt(count / 20)
        lagged = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
        assert lagged.abs() < 5 / math.sqrt(count)


def test_draws_follow_the_distribution() -> None:
    draws = 20_000
    config = SamplingConfig(temperature=1.0, top_p=0.85)
    rows = rows_of([config] * draws, vocab_size=4)
    tokens = draw(LOGITS.expand(draws, -1), rows, Features.of([config], [None], 4)).token_b
    share = torch.bincount(tokens, minlength=4) / draws
    expected = torch.tensor(normalised([0.15, 0.5, 0, 0.25]))
    assert share[2] == 0
    # Five standard deviations of a share of 20,000 draws.
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(1)
    size, steps = 200, 12
    logits = torch.randn(steps, len(SETTINGS), size) * 4
    seen = [[3, 4, 5 + i] for i in range(len(SETTINGS))]

    def drawn(members: list[int]) -> list[list[int]]:
        configs = [SETTINGS[i] for i in members]
        rows = rows_of(
            configs, [100 + i for i in members], vocab_size=size, seen=[seen[i] for i in members]
        )
        features = Features.of(configs, [None], size)
        tokens = [draw(logits[t, members], rows, features).token_b for t in range(steps)]
        return torch.stack(tokens).T.tolist()

    together = drawn(list(range(len(SETTINGS))))
    assert together == [drawn([i])[0] for i in range(len(SETTINGS))]
    assert drawn([3, 1]) == [together[3], together[1]]
    assert len({tuple(row) for row in together}) == len(SETTINGS)


def one(logits: Tensor, logprobs: int | None = None) -> Drawn:
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    rows = rows_of([config] * len(logits), vocab_size=logits.shape[1])
    return draw(logits, rows, Features.of([config], [logprobs], logits.shape[1]))


def test_logits_that_are_not_finite_spoil_their_row_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    expected = one(logits).token_b.tolist()
    logits[1, 7], logits[2, 0] = math.nan, math.inf
    assert one(logits).token_b.tolist() == [expected[0], -1, -1, expected[3]]


def test_log_probabilities_are_the_models() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50) * 2
    expected = logits.log_softmax(dim=-1)
    plain, some = one(logits, 0), one(logits, 5)
    assert plain.logprob_b is not None
    assert plain.top_logprob_bw is None
    torch.testing.assert_close(plain.logprob_b, expected.gather(1, plain.token_b[:, None])[:, 0])
    assert some.top_logprob_bw is not None
    assert some.top_token_bw is not None
    best = expected.topk(20, dim=-1)
    torch.testing.assert_close(some.top_logprob_bw, best.values)
    assert torch.equal(some.top_token_bw, best.indices)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 1e39),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("stop", ["a", ""]),
        ("stop_token_ids", [3, -1]),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    config = SamplingConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^sampling\.{field}="):
        config.validate()


@runs_kernels
def test_draws_of_the_kernel_match_the_reference() -> None:
    configs = [config for config in SETTINGS if config.typical_p == 1]
    configs += [SamplingConfig(temperature=1e-30), SamplingConfig(temperature=1.0, top_p=1e-5)]
    rows = SamplingRows.new(len(configs), DEVICE)
    for i, config in enumerate(configs):
        rows.put(i, [(config, -7919 * i, ())])
    features = Features.of(configs, [None], 600)
    torch.manual_seed(0)
    for _ in range(1 if kernels.INTERPRETED else 200):
        scores = (3 * torch.randn(len(configs), 700)).to(DEVICE)[:, :600]
        scores[4, 17] = math.nan
        expected = _draw(scores, rows, features)
        assert expected[4] == -1
        before = rows.integers_bk[:, 1].clone()
        found = _draw_by_kernel(scores, rows, features)
        assert torch.equal(found, expected)
        assert torch.equal(rows.integers_bk[:, 1], before + 1)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same test runs directly"
)
def test_draws_in_the_interpreter() -> None:
    run_in_interpreter(__file__, "kernel_match", passed=1)
