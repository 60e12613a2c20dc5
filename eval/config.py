"""The root schema of ``python -m eval``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mamba2lm.data.recall import RecallConfig, check_recall
from mamba2lm.schema import ConfigError, closest


class Window(enum.Enum):
    """What a token's prediction has for context."""

    disjoint = "disjoint"
    """The text cut into windows; each begins from nothing."""
    strided = "strided"
    """Overlapping windows; each token is scored once, with ``length − stride`` tokens before it or
    all there are."""
    streaming = "streaming"
    """All of the document before it, carried in the state; only for a state of constant size."""


@dataclass
class PerplexityConfig:
    """What text to score, and with what context."""

    sources: list[Any] = field(default_factory=list)
    """Text, as in data.sources; empty takes the run's own held-out text."""
    window: Window = Window.disjoint
    length: int | None = None
    """Tokens in a window, or read at once when streaming; default the run's sequence length."""
    stride: int | None = None
    """Tokens a strided window moves on by; default half of its length."""
    max_tokens: int | None = None
    """Score about this many tokens from the start of the text; null means all."""
    batch_size: int = 8
    """Windows read together; speed and memory only."""

    def validate(self, key: str = "perplexity") -> None:
        """Check every value.

        Raises:
            ConfigError: Naming the key, its value and its range.
        """
        for name in ("length", "stride", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name}", value, "must be ≥ 1, or null for the default.")
        if self.stride is not None:
            if self.window is not Window.strided:
                raise ConfigError(
                    f"{key}.stride", self.stride, f"means nothing with window={self.window.value}."
                )
            if self.length is not None and self.stride > self.length:
                raise ConfigError(
                    f"{key}.stride",
                    self.stride,
                    f"must be at most {key}.length={self.length}, or tokens between windows would "
                    "not be scored.",
                )


@dataclass
class RecallEvalConfig:
    """Which associative-recall sequences to ask."""

    length: int = 256
    n_pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """One accuracy is reported for each number of key-value pairs."""
    n_examples: int = 256
    """Sequences for each number of pairs."""
    vocab_size: int | None = None
    """Ids used, an even number; default the model's vocabulary, at most 8192."""
    batch_size: int = 16
    """Sequences read together; speed and memory only."""

    def validate(self, key: str = "recall") -> None:
        """Check every value that can be checked without a model.

        Raises:
            ConfigError: Naming the key, its value and its range.
        """
        for name in ("n_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "must be ≥ 1.")
        if not self.n_pairs:
            raise ConfigError(f"{key}.n_pairs", self.n_pairs, "is empty; give for example [4, 16].")
        for n_pairs in self.n_pairs:
            check_recall(self.task(n_pairs, self.vocab_size or 8192), key)

    def task(self, n_pairs: int, vocab_size: int) -> RecallConfig:
        """Return the generator's config for one number of pairs."""
        return RecallConfig(
            vocab_size=self.vocab_size or min(vocab_size, 8192) // 2 * 2,
            length=self.length,
            n_pairs=n_pairs,
            n_test=self.n_examples,
        )


TASKS = ("perplexity", "recall")


@dataclass
class EvalConfig:
    """Everything ``python -m eval`` takes."""

    checkpoint: str = MISSING
    """A run folder (its newest valid checkpoint) or one checkpoint."""
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    output: str | None = None
    """JSON file; default eval-STEP.json in the run's folder, numbered if there is one already."""
    seed: int = 0
    """Of the synthetic examples."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` …"""
    dtype: str = "auto"
    """``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float64``."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    recall: RecallEvalConfig = field(default_factory=RecallEvalConfig)

    def validate(self) -> None:
        """Check every value that can be checked without a model.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        if not self.tasks:
            raise ConfigError("tasks", self.tasks, f"is empty; known: {', '.join(TASKS)}.")
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(
                    "tasks", task, f"no such task.{closest(task, TASKS)} Known: {', '.join(TASKS)}."
                )
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "must be ≥ 0.")
        if "perplexity" in self.tasks:
            self.perplexity.validate()
        if "recall" in self.tasks:
            self.recall.validate()
