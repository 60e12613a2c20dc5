"""From logits to the next token, for rows that each have their own settings.

Axes: b batch row, v vocabulary, w the largest few of it in descending order, k columns of numbers.

All rows are drawn together on their device; a row's token depends on its own logits, settings, seed
and number of tokens drawn so far, never on its neighbours. One uniform number a row and token, a
hash of (seed, number of tokens drawn), inverts the row's cumulative distribution. No generator is
advanced, so a row can be drawn anywhere, in any batch, inside a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mamba2lm.ops.draw.launch import draw_at_random, draw_greedily, unsupported
from mamba2lm.schema import ConfigError

CONSTRAINTS = ("json_schema", "regex", "grammar")
"""Fields of ``SamplingConfig`` that say what a text must follow."""

MAX_LOGPROBS = 20
"""Most alternatives that are reported beside a token."""

_REPETITION, _PRESENCE, _FREQUENCY, _TEMPERATURE, _TOP_P, _MIN_P, _TYPICAL = range(7)
_SEED, _DRAWN, _TOP_K = range(3)
# Below this float32 has no normal number; nothing but the most likely token is drawn long before.
_COLDEST = 1e-30
# Of a setting: its products with logits and counts stay finite in float32.
_LARGEST = 1e6
_GOLDEN, _MIX_1, _MIX_2 = (
    constant - (1 << 64)
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass
class SamplingConfig:
    """How the next token is chosen; penalties and filters apply in the order written here."""

    repetition_penalty: float = 1.0
    """Logits of tokens already seen are divided by it where positive and multiplied where negative
    (Keskar et al. 2019, arXiv:1909.05858, §4.1); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the continuation already has; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time the continuation has it; 0 is off."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that have this much probability together (Holtzman et al.
    2019, arXiv:1904.09751); 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability; 0 is off."""
    typical_p: float = 1.0
    """Keep the fewest tokens that have this much probability together, those first whose surprise
    is nearest to the entropy (Meister et al. 2022, arXiv:2202.00666); 1 is off."""
    stop: list[str] = field(default_factory=list)
    """The text ends before the first of these strings."""
    stop_token_ids: list[int] = field(default_factory=list)
    """The text ends before any of these tokens, as it does before the end-of-text token."""
    json_schema: str | None = None
    """The text is JSON that follows this schema (written as JSON). Of this and the next two at most
    one; they need the extra ``structured``."""
    regex: str | None = None
    """The whole text matches this regular expression (in Rust's syntax)."""
    grammar: str | None = None
    """The text follows this grammar (Lark's syntax, as llguidance reads it)."""

    def validate(self, key: str = "sampling") -> None:
        """Check every field.

        Args:
            key: Dotted config key of this section, for errors.

        Raises:
            ConfigError: Naming the field, its value and its range.
        """

        def require(good: bool, name: str, remedy: str) -> None:
            if not good:
                raise ConfigError(f"{key}.{name}", getattr(self, name), remedy)

        penalty, temperature = self.repetition_penalty, self.temperature
        require(
            penalty > 0 and math.isfinite(penalty),
            "repetition_penalty",
            "must be a finite number above 0; 1 is off.",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            require(math.isfinite(getattr(self, name)), name, "must be a finite number; 0 is off.")
        require(
            0 <= temperature <= _LARGEST,
            "temperature",
            f"must be from 0 to {_LARGEST:g}; 0 takes the most likely token.",
        )
        require(self.top_k >= 0, "top_k", "must be ≥ 0; 0 is off.")
        require(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1; 1 is off.")
        require(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]; 0 is off.")
        require(0 < self.typical_p <= 1, "typical_p", "must be above 0 and at most 1; 1 is off.")
        require(
            all(self.stop), "stop", "holds an empty string, which would end every text at once."
        )
        require(
            all(token >= 0 for token in self.stop_token_ids),
            "stop_token_ids",
            "holds a negative id.",
        )
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{key}.{given[1]}", getattr(self, given[1]), f"{given[0]} is given too; give one."
            )

    @property
    def constraint(self) -> tuple[str, str] | None:
        """What the text must follow: the field's name and its value."""
        for name in CONSTRAINTS:
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class Features(NamedTuple):
    """What a batch needs computed; a row that needs less gets the same token with more."""

    greedy: bool
    """No row draws at random."""
    penalties: bool
    masked: bool
    """Some row may only draw some tokens."""
    width: int
    """How many of the largest logits are sorted, for top-k and top-p; 0 for none."""
    min_p: bool
    typical: bool
    logprobs: int
    """Alternatives reported beside a token; 0 for the token alone, −1 for nothing."""

    @classmethod
    def of(
        cls, configs: Iterable[SamplingConfig], logprobs: Iterable[int | None], vocab_size: int
    ) -> Self:
        """Return what these rows need together, in few enough shapes to record graphs for."""
        configs = list(configs)
        drawn = [config for config in configs if config.temperature > 0]
        width = 0
        for config in drawn:
            if 0 < config.top_k < vocab_size:
                width = max(width, 64, 1 << (config.top_k - 1).bit_length())
            elif config.top_p < 1:
                width = vocab_size
        asked = max((-1 if count is None else count for count in logprobs), default=-1)
        return cls(
            greedy=not drawn,
            penalties=any(config.penalises for config in configs),
            masked=any(config.constraint is not None for config in configs),
            width=min(width, vocab_size),
            min_p=any(config.min_p > 0 for config in drawn),
            typical=any(config.typical_p < 1 for config in drawn),
            logprobs=asked if asked <= 0 else min(MAX_LOGPROBS, vocab_size),
        )


class SamplingRows:
    """The settings of a batch's rows and what they have drawn, as tensors on their device."""

    def __init__(
        self,
        numbers_bk: Tensor,
        integers_bk: Tensor,
        counts_bv: Tensor | None = None,
        seen_bv: Tensor | None = None,
        mask_bw: Tensor | None = None,
    ) -> None:
        self.numbers_bk = numbers_bk
        self.integers_bk = integers_bk
        self.counts_bv = counts_bv
        """How often each token was drawn; kept from when a row first needs it."""
        self.seen_bv = seen_bv
        """What the repetition penalty applies to beside that: the prompt's tokens."""
        self.mask_bw = mask_bw
        """Tokens that may be drawn, a bit each; kept from when a row first needs it."""

    @classmethod
    def new(cls, rows: int, device: torch.device | str = "cpu") -> Self:
        """Return rows without settings."""
        return cls(
            torch.zeros(rows, 7, dtype=torch.float32, device=device),
            torch.zeros(rows, 3, dtype=torch.int64, device=device),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, first axis the row."""
        return [tensor for tensor in self._all if tensor is not None]

    @property
    def _all(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.numbers_bk, self.integers_bk, self.counts_bv, self.seen_bv, self.mask_bw

    def _each(self, change: Callable[[Tensor], Tensor]) -> SamplingRows:
        numbers_bk, integers_bk, *kept = self._all
        return SamplingRows(
            change(numbers_bk),
            change(integers_bk),
            *(None if tensor is None else change(tensor) for tensor in kept),
        )

    def rows(self, start: int, stop: int) -> SamplingRows:
        """Return views of the rows from ``start`` up to ``stop``."""
        return self._each(lambda tensor: tensor[start:stop])

    def clone(self) -> SamplingRows:
        """Return a copy that later draws do not change."""
        return self._each(Tensor.clone)

    def grown(self, rows: int) -> SamplingRows:
        """Return the same rows with more after them."""

        def more(tensor: Tensor) -> Tensor:
            grown = tensor.new_zeros(rows, *tensor.shape[1:])
            grown[: tensor.shape[0]] = tensor
            return grown

        return self._each(more)

    def track(self, vocab_size: int) -> None:
        """Keep counts of drawn and seen tokens from here on."""
        if self.counts_bv is None:
            rows, device = self.numbers_bk.shape[0], self.numbers_bk.device
            self.counts_bv = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)
            self.seen_bv = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def track_masks(self, vocab_size: int) -> None:
        """Keep which tokens each row may draw from here on: all, until told otherwise."""
        if self.mask_bw is None:
            rows, device = self.numbers_bk.shape[0], self.numbers_bk.device
            self.mask_bw = torch.full(
                (rows, mask_words(vocab_size)), -1, dtype=torch.int32, device=device
            )

    def allow(self, indices: Sequence[int], mask_bw: Tensor) -> None:
        """Let rows draw only some tokens.

        Args:
            indices: Which rows.
            mask_bw: A bit for each token, (rows, words), int32.
        """
        assert self.mask_bw is not None
        device = self.mask_bw.device
        index = sent(indices, torch.int64, device)
        self.mask_bw.index_copy_(0, index, mask_bw.to(device))

    def put(
        self, first: int, settings: Sequence[tuple[SamplingConfig, int, Collection[int]]]
    ) -> None:
        """Give rows their settings; they have drawn nothing yet.

        Args:
            first: Row of the first; the others follow it.
            settings: Of each row: checked settings; a seed, any integer, whose lowest 64 bits
                count; and ids that the repetition penalty applies to from the start.
        """
        device = self.numbers_bk.device
        rows = slice(first, first + len(settings))
        numbers = [_numbers(config) for config, _, _ in settings]
        integers = [_integers(config, seed) for config, seed, _ in settings]
        self.numbers_bk[rows] = sent(numbers, torch.float32, device)
        self.integers_bk[rows] = sent(integers, torch.int64, device)
        if self.mask_bw is not None:
            self.mask_bw[rows].fill_(-1)
        if self.counts_bv is None or self.seen_bv is None:
            return
        self.counts_bv[rows].zero_()
        self.seen_bv[rows].zero_()
        for row, (config, _, seen) in enumerate(settings, first):
            if seen and config.repetition_penalty != 1:
                ids = sent(list(seen), torch.int64, device)
                self.seen_bv[row].index_fill_(0, ids, True)

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for tensor in self.tensors:
            tensor[target].copy_(tensor[source])


def sent(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device; a GPU gets them in its turn, nobody waits for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


def _numbers(config: SamplingConfig) -> list[float]:
    """Return a row of ``SamplingRows.numbers_bk``."""
    numbers = [0.0] * 7
    numbers[_REPETITION] = config.repetition_penalty
    numbers[_PRESENCE] = config.presence_penalty
    numbers[_FREQUENCY] = config.frequency_penalty
    numbers[_TEMPERATURE] = max(config.temperature, _COLDEST) if config.temperature else 0.0
    numbers[_TOP_P] = config.top_p
    numbers[_MIN_P] = config.min_p
    numbers[_TYPICAL] = config.typical_p
    return numbers


def _integers(config: SamplingConfig, seed: int) -> list[int]:
    """Return a row of ``SamplingRows.integers_bk``."""
    integers = [0] * 3
    integers[_SEED] = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    integers[_TOP_K] = min(config.top_k, 1 << 62)
    return integers


class Drawn(NamedTuple):
    """One token a row."""

    token_b: Tensor
    """int64; −1 where a row's logits are not finite."""
    logprob_b: Tensor | None
    """The token's log-probability by the model alone, before any penalty or temperature."""
    top_logprob_bw: Tensor | None
    top_token_bw: Tensor | None


def draw(logits_bv: Tensor, rows: SamplingRows, features: Features) -> Drawn:
    """Draw one token a row and count it.

    Args:
        logits_bv: (b, v), float32 or float64.
        rows: Settings of these rows; ``counts_bv`` and the number of tokens drawn are advanced.
        features: What to compute; at least what the rows need.
    """
    scores_bv = penalised(logits_bv, rows) if features.penalties else logits_bv
    if features.masked:
        scores_bv = allowed(scores_bv, rows)
    if features.typical or not logits_bv.is_cuda or unsupported(logits_bv) is not None:
        token_b = _draw(scores_bv, rows, features)
        rows.integers_bk[:, _DRAWN] += 1
    elif features.greedy:
        token_b = draw_greedily(scores_bv, rows.integers_bk[:, _DRAWN])
    else:
        token_b = _draw_by_kernel(scores_bv, rows, features)
    if not features.penalties and features.logprobs < 0:
        return Drawn(token_b, None, None, None)
    chosen_b1 = token_b.clamp(min=0)[:, None]
    if features.penalties:
        assert rows.counts_bv is not None
        rows.counts_bv.scatter_add_(1, chosen_b1, torch.ones_like(chosen_b1, dtype=torch.int32))
    if features.logprobs < 0:
        return Drawn(token_b, None, None, None)
    total_b1 = logits_bv.logsumexp(dim=-1, keepdim=True)
    logprob_b = (logits_bv.gather(1, chosen_b1) - total_b1)[:, 0]
    if features.logprobs == 0:
        return Drawn(token_b, logprob_b, None, None)
    top_bw, top_token_bw = logits_bv.topk(features.logprobs, dim=-1)
    return Drawn(token_b, logprob_b, top_bw - total_b1, top_token_bw)


def _draw(scores_bv: Tensor, rows: SamplingRows, features: Features) -> Tensor:
    """Return a token a row, −1 where the scores are not finite."""
    token_b = scores_bv.argmax(dim=-1)
    if not features.greedy:
        cumulative_bv = probabilities(scores_bv, rows, features).cumsum(dim=-1)
        total_b1 = cumulative_bv[:, -1:].contiguous()
        integers_bk = rows.integers_bk
        uniform_b1 = uniform(integers_bk[:, _SEED], integers_bk[:, _DRAWN])[:, None]
        drawn_b1 = torch.searchsorted(cumulative_bv, uniform_b1 * total_b1, right=True)
        # Where the product rounds up to the total: the last token of any probability.
        last_b1 = torch.searchsorted(cumulative_bv, total_b1)
        # Only a row that is not in use can lie beyond the last token.
        drawn_b = torch.minimum(drawn_b1, last_b1)[:, 0].clamp(max=scores_bv.shape[1] - 1)
        token_b = torch.where(rows.numbers_bk[:, _TEMPERATURE] == 0, token_b, drawn_b)
    return torch.where(scores_bv.amax(dim=-1).isfinite(), token_b, -1)


def _draw_by_kernel(scores_bv: Tensor, rows: SamplingRows, features: Features) -> Tensor:
    """Do the same in float32 in one kernel, and count the draw."""
    integers_bk, numbers_bk = rows.integers_bk, rows.numbers_bk
    return draw_at_random(
        scores_bv,
        seed_b=integers_bk[:, _SEED],
        drawn_b=integers_bk[:, _DRAWN],
        top_k_b=integers_bk[:, _TOP_K],
        temperature_b=numbers_bk[:, _TEMPERATURE],
        top_p_b=numbers_bk[:, _TOP_P],
        min_p_b=numbers_bk[:, _MIN_P],
        limited=features.width > 0,
    )


def penalised(logits_bv: Tensor, rows: SamplingRows) -> Tensor:
    """Return the logits after the penalties on earlier tokens."""
    assert rows.counts_bv is not None
    assert rows.seen_bv is not None
    column = rows.numbers_bk.to(logits_bv.dtype).unbind(dim=1)
    count_bv = rows.counts_bv
    factor_b1 = column[_REPETITION][:, None]
    repeated_bv = torch.where(logits_bv < 0, logits_bv * factor_b1, logits_bv / factor_b1)
    scores_bv = torch.where(rows.seen_bv | (count_bv > 0), repeated_bv, logits_bv)
    scores_bv = scores_bv - column[_PRESENCE][:, None] * (count_bv > 0)
    return scores_bv - column[_FREQUENCY][:, None] * count_bv


def mask_words(vocab_size: int) -> int:
    """Return how many words of 32 bits hold one for each token."""
    return -(-vocab_size // 32)


def allowed(scores_bv: Tensor, rows: SamplingRows) -> Tensor:
    """Return the scores, −∞ for tokens that a row may not draw."""
    assert rows.mask_bw is not None
    bit = torch.arange(32, dtype=torch.int32, device=scores_bv.device)
    bit_bv = ((rows.mask_bw[:, :, None] >> bit) & 1).flatten(1)[:, : scores_bv.shape[1]]
    return scores_bv.where(bit_bv == 1, -math.inf)


def probabilities(scores_bv: Tensor, rows: SamplingRows, features: Features) -> Tensor:
    """Return what tokens are drawn with, in proportion; temperature-0 rows are meaningless.

    Args:
        scores_bv: Logits after the penalties, (b, v).
        rows: Settings of these rows.
        features: Which filters any row has.

    Returns:
        (b, v) float64, the most likely token's 1, a dropped token's 0.
    """
    column = rows.numbers_bk.to(scores_bv.dtype).unbind(dim=1)
    # The largest becomes 0, so that no temperature, however small, overflows.
    scores_bv = scores_bv - scores_bv.amax(dim=-1, keepdim=True)
    scores_bv = scores_bv / column[_TEMPERATURE].clamp(min=_COLDEST)[:, None]
    weight_bv = scores_bv.double().exp()
    if features.width:
        least_b1 = _least_kept(scores_bv, rows, features.width)
        weight_bv = weight_bv.where(scores_bv >= least_b1, 0.0)
    if features.min_p:
        weight_bv = weight_bv.where(weight_bv >= rows.numbers_bk[:, _MIN_P, None].double(), 0.0)
    if features.typical:
        weight_bv = _typical(weight_bv, rows.numbers_bk[:, _TYPICAL, None].double())
    return weight_bv


def _least_kept(scores_bv: Tensor, rows: SamplingRows, width: int) -> Tensor:
    """Return the smallest score that top-k and top-p keep, −inf where both are off.

    A score and not a rank, so that equal scores share their fate whatever sorted them.
    """
    vocab_size = scores_bv.shape[1]
    if width < vocab_size:
        sorted_bw = scores_bv.topk(width, dim=-1).values
    else:
        sorted_bw = scores_bv.sort(dim=-1, descending=True).values
    top_k_b1, top_p_b1 = rows.integers_bk[:, _TOP_K, None], rows.numbers_bk[:, _TOP_P, None]
    rank_w = torch.arange(width, device=scores_bv.device)
    kept_bw = (rank_w < top_k_b1) | (top_k_b1 == 0)
    weight_bw = sorted_bw.double().exp() * kept_bw
    before_bw = weight_bw.cumsum(dim=-1) - weight_bw
    total_b1 = weight_bw.sum(dim=-1, keepdim=True)
    kept_bw = kept_bw & ((before_bw < top_p_b1.double() * total_b1) | (top_p_b1 == 1))
    # Rows that nobody uses any more may keep none.
    least_b1 = sorted_bw.gather(1, (kept_bw.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    off_b1 = ((top_k_b1 == 0) | (top_k_b1 >= vocab_size)) & (top_p_b1 == 1)
    return least_b1.masked_fill(off_b1, -math.inf)


def _typical(weight_bv: Tensor, mass_b1: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, up to a mass."""
    share_bv = weight_bv / weight_bv.sum(dim=-1, keepdim=True)
    surprise_bv = -share_bv.log()
    entropy_b1 = (share_bv * surprise_bv).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
    distance_bv = (surprise_bv - entropy_b1).abs()
    sorted_bv, order_bv = distance_bv.sort(dim=-1)
    cumulative_bv = share_bv.gather(1, order_bv).cumsum(dim=-1)
    last_b1 = (cumulative_bv < mass_b1).sum(dim=-1, keepdim=True)
    furthest_b1 = sorted_bv.gather(1, last_b1.clamp(max=weight_bv.shape[1] - 1))
    return weight_bv.where((distance_bv <= furthest_b1) | (mass_b1 == 1), 0.0)


def uniform(seed_b: Tensor, index_b: Tensor) -> Tensor:
    """Return a number in [0, 1) for each (seed, index), float64, the same on every device.

    Splitmix64 (Steele et al. 2014, OOPSLA) started from the hash of the seed.
    """
    hashed_b = _splitmix(_splitmix(seed_b + _GOLDEN) + index_b * _GOLDEN)
    return _shifted(hashed_b, 11).double() * 2.0**-53


def _splitmix(z_b: Tensor) -> Tensor:
    z_b = (z_b ^ _shifted(z_b, 30)) * _MIX_1
    z_b = (z_b ^ _shifted(z_b, 27)) * _MIX_2
    return z_b ^ _shifted(z_b, 31)


def _shifted(z_b: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned integer."""
    return (z_b >> bits) & ((1 << (64 - bits)) - 1)
