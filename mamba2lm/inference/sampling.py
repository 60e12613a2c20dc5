"""From logits to the next token. Axes: b batch row, v vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamba2lm.schema import ConfigError


@dataclass
class SamplingConfig:
    """How the next token is chosen; the filters apply in the order written here."""

    repetition_penalty: float = 1.0
    """Logits of tokens already seen are divided by it where positive and multiplied where negative
    (Keskar et al. 2019, arXiv:1909.05858, §4.1); 1 is off."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that have this much probability together (Holtzman et al.
    2019, arXiv:1904.09751); 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability; 0 is off."""
    stop: list[str] = field(default_factory=list)
    """The text ends before the first of these strings."""

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
        require(
            temperature >= 0 and math.isfinite(temperature),
            "temperature",
            "must be a finite number ≥ 0; 0 takes the most likely token.",
        )
        require(self.top_k >= 0, "top_k", "must be ≥ 0; 0 is off.")
        require(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1; 1 is off.")
        require(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]; 0 is off.")
        require(
            all(self.stop), "stop", "holds an empty string, which would end every text at once."
        )


class Sampler:
    """Choose one token a row, each row by its own random generator."""

    def __init__(self, config: SamplingConfig) -> None:
        """Build the filters that ``config`` switches on; the config must be valid."""
        self.config = config
        self._penalty: Callable[..., Tensor] | None = None
        self._filters: list[Callable[..., Tensor]] = []
        greedy = config.temperature == 0
        filtering = not greedy and (config.top_k > 0 or config.top_p < 1 or config.min_p > 0)
        if config.repetition_penalty == 1 and not filtering:
            return
        # Takes about a second; plain temperature sampling does not wait for it.
        from transformers.generation.logits_process import (
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        if config.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))
        if filtering and config.top_k > 0:
            self._filters.append(TopKLogitsWarper(config.top_k))
        if filtering and config.top_p < 1:
            self._filters.append(TopPLogitsWarper(config.top_p))
        if filtering and config.min_p > 0:
            self._filters.append(MinPLogitsWarper(config.min_p))

    def distribution(self, logits_bv: Tensor, seen: Sequence[Collection[int]]) -> Tensor:
        """Return the probabilities that tokens are drawn with.

        Args:
            logits_bv: (b, v), float32 or float64.
            seen: For each row the ids that the repetition penalty applies to.

        Returns:
            (b, v), float64; one-hot at temperature 0.
        """
        scores_bv = self._penalised(logits_bv, seen).double()
        # The largest becomes 0, so that no temperature, however small, overflows.
        scores_bv = scores_bv - scores_bv.amax(dim=-1, keepdim=True)
        if self.config.temperature == 0:
            best_b = scores_bv.argmax(dim=-1)
            return torch.nn.functional.one_hot(best_b, scores_bv.shape[-1]).double()
        scores_bv = scores_bv / self.config.temperature
        unused = torch.empty(len(seen), 0, dtype=torch.int64, device=scores_bv.device)
        for keep in self._filters:
            scores_bv = keep(unused, scores_bv)
        return scores_bv.softmax(dim=-1)

    def __call__(
        self,
        logits_bv: Tensor,
        seen: Sequence[Collection[int]],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Draw one token a row.

        Args:
            logits_bv: (b, v), float32 or float64.
            seen: For each row the ids that the repetition penalty applies to.
            generators: One a row, on the CPU. Each gives one uniform number a call, which inverts
                the cumulative distribution: a row's tokens depend on nothing but its own seed and
                its own logits, whatever the batch and the device.

        Returns:
            (b,) int64.
        """
        if self.config.temperature == 0:
            return self._penalised(logits_bv, seen).argmax(dim=-1)
        cumulative_bv = self.distribution(logits_bv, seen).cumsum(dim=-1)
        uniform_b1 = torch.stack(
            [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
        ).to(logits_bv.device)
        total_b1 = cumulative_bv[:, -1:].contiguous()
        drawn_b1 = torch.searchsorted(cumulative_bv, uniform_b1 * total_b1, right=True)
        # Where the product rounds up to the total: the last token of any probability.
        last_b1 = torch.searchsorted(cumulative_bv, total_b1)
        return torch.minimum(drawn_b1, last_b1)[:, 0]

    def _penalised(self, logits_bv: Tensor, seen: Sequence[Collection[int]]) -> Tensor:
        width = max((len(ids) for ids in seen), default=0)
        if self._penalty is None or width == 0:
            return logits_bv
        # Rows have seen different numbers of ids. A repeated id counts once, so a row is filled up
        # with one of its own; a row that has seen none is put back as it was.
        filled = [[*ids, *[next(iter(ids), 0)] * (width - len(ids))] for ids in seen]
        penalised_bv = self._penalty(torch.tensor(filled, device=logits_bv.device), logits_bv)
        some_b1 = torch.tensor([[len(ids) > 0] for ids in seen], device=logits_bv.device)
        return torch.where(some_b1, penalised_bv, logits_bv)
