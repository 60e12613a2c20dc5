"""The root schema of ``python -m eval``."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mamba2lm.data import InductionConfig, RecallConfig, SelectiveCopyingConfig
from mamba2lm.schema import ConfigError, closest


class Form(enum.Enum):
    """Which of the two equal ways a model reads."""

    parallel = "parallel"
    """Stretches of tokens at once, as in training and prefill."""
    recurrent = "recurrent"
    """One token after another, as in generation."""


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
class LengthConfig:
    """How the loss goes on beyond the length a model was trained at."""

    sources: list[Any] = field(default_factory=list)
    """Text, as in data.sources; empty takes the run's own held-out text. Documents are joined."""
    length: int | None = None
    """1×, in tokens; default the run's sequence length."""
    multiples: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """Windows are as many times 1×; those longer than the text are left out."""
    max_tokens: int | None = None
    """Score at most so many tokens; null means all."""
    batch_size: int = 8
    """Windows read together; speed and memory only."""

    def validate(self, key: str = "length") -> None:
        """Check every value; raise ConfigError."""
        for name in ("length", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name}", value, "must be ≥ 1, or null for the default.")
        _check_list(self.multiples, f"{key}.multiples", 1)


@dataclass
class RecallEvalConfig:
    """Which associative-recall sequences to ask."""

    preset: str | None = None
    """zoology, based, mamba2 or fast: the test sets of that figure, instead of ``length`` and
    ``n_pairs``."""
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
        _check_preset(self.preset, RECALL_PRESETS, key)
        for length, n_pairs in self.sets():
            self.task(n_pairs, self.vocab_size or 8192, length).check(key)

    def sets(self) -> list[tuple[int, int]]:
        """Return (length, number of pairs) of every test set."""
        if self.preset is not None:
            return list(RECALL_PRESETS[self.preset])
        return [(self.length, n_pairs) for n_pairs in self.n_pairs]

    def task(self, n_pairs: int, vocab_size: int, length: int | None = None) -> RecallConfig:
        """Return the generator's config for one test set."""
        return RecallConfig(
            vocab_size=self.vocab_size or min(vocab_size, 8192) // 2 * 2,
            length=length or self.length,
            n_pairs=n_pairs,
            n_test=self.n_examples,
        )


RECALL_PRESETS: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "zoology": ((64, 4), (128, 8), (256, 16), (512, 64)),
    "based": ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
    "mamba2": ((256, 64), (512, 128), (1024, 256)),
    "fast": ((256, 16), (256, 32), (256, 64)),
}
"""(length, pairs) of the test sets of each paper's figure."""


@dataclass
class InductionEvalConfig:
    """At which lengths to ask what followed the special token the last time."""

    preset: str | None = None
    """mamba: lengths 2^6 to 2^20, vocabulary 16."""
    lengths: list[int] = field(default_factory=lambda: [2**i for i in range(6, 15)])
    n_examples: int = 64
    """Sequences for each length."""
    vocab_size: int = 16
    batch_size: int = 16
    """Sequences read together; speed and memory only."""
    longest_growing: int = 16384
    """Longest length for a model whose state grows (attention); longer ones are left out."""

    def validate(self, key: str = "induction") -> None:
        """Check every value; raise ConfigError."""
        for name in ("n_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "must be ≥ 1.")
        _check_preset(self.preset, ("mamba",), key)
        _check_list(self.lengths, f"{key}.lengths", 3)
        self.task(self.lengths[0]).check(key)

    def all_lengths(self) -> list[int]:
        """Return every length asked for."""
        return self.lengths if self.preset is None else [2**i for i in range(6, 21)]

    def task(self, length: int) -> InductionConfig:
        """Return the generator's config at one length."""
        vocab_size = self.vocab_size if self.preset is None else 16
        return InductionConfig(vocab_size=vocab_size, length=length, n_test=self.n_examples)


@dataclass
class SelectiveCopyingEvalConfig:
    """Which selective-copying sequences to ask."""

    preset: str | None = None
    """mamba: length 4096, vocabulary 16, 16 data tokens."""
    length: int = 4096
    n_tokens: int = 16
    vocab_size: int = 16
    n_examples: int = 128
    batch_size: int = 16
    """Sequences read together; speed and memory only."""

    def validate(self, key: str = "selective_copying") -> None:
        """Check every value; raise ConfigError."""
        for name in ("n_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "must be ≥ 1.")
        _check_preset(self.preset, ("mamba",), key)
        self.task().check(key)

    def task(self) -> SelectiveCopyingConfig:
        """Return the generator's config."""
        if self.preset is not None:
            return SelectiveCopyingConfig(n_test=self.n_examples)
        return SelectiveCopyingConfig(
            vocab_size=self.vocab_size,
            length=self.length,
            n_tokens=self.n_tokens,
            n_test=self.n_examples,
        )


@dataclass
class PasskeyConfig:
    """At which lengths and depths to hide a number in a text."""

    preset: str | None = None
    """stuffed: 1K to 256K tokens, 5 digits, 11 depths."""
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Tokens of the whole prompt, at most."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Share of the filler that comes before the number."""
    n_examples: int = 4
    """Numbers for each length and depth."""
    digits: int = 5
    batch_size: int = 4
    """Prompts read together; speed and memory only."""

    def validate(self, key: str = "passkey") -> None:
        """Check every value; raise ConfigError."""
        for name in ("n_examples", "batch_size", "digits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "must be ≥ 1.")
        _check_preset(self.preset, ("stuffed",), key)
        _check_list(self.lengths, f"{key}.lengths", 1)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"{key}.depths", self.depths, "give numbers from 0 to 1.")

    def grid(self) -> tuple[list[int], list[float]]:
        """Return lengths and depths."""
        if self.preset is None:
            return self.lengths, self.depths
        return [2**i for i in range(10, 19)], [i / 10 for i in range(11)]


@dataclass
class LastWordConfig:
    """Texts whose last word is to be predicted (LAMBADA)."""

    sources: list[Any] = field(default_factory=list)
    """Text, as in data.sources; LAMBADA is {path: lambada-test.jsonl}."""
    preset: str | None = None
    """lambada: stands the papers' figures beside ours; the text is still what sources names."""
    max_documents: int | None = None
    batch_size: int = 8
    """Texts read together; speed and memory only."""

    def validate(self, key: str = "last_word") -> None:
        """Check every value; raise ConfigError."""
        if not self.sources:
            raise ConfigError(
                f"{key}.sources", self.sources, "name texts, for example [{path: lambada.jsonl}]."
            )
        for name in ("max_documents", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name}", value, "must be ≥ 1.")
        _check_preset(self.preset, ("lambada",), key)


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness (``pip install mamba2lm[harness]``)."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    """Folder of further tasks' YAML files."""
    num_fewshot: int | None = None
    """Examples in the prompt; null takes each task's own number."""
    limit: int | None = None
    """Documents of each task; null means all."""
    max_length: int = 2048
    """Most tokens of a context and its continuation; longer ones are cut on the left."""
    batch_size: int = 8
    """Requests read together; speed and memory only."""

    def validate(self, key: str = "harness") -> None:
        """Check every value; raise ConfigError."""
        if not self.tasks:
            raise ConfigError(f"{key}.tasks", self.tasks, "name tasks, for example [piqa].")
        if self.max_length < 2:
            raise ConfigError(f"{key}.max_length", self.max_length, "must be ≥ 2.")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}.{name}", value, "must be ≥ 1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"{key}.num_fewshot", self.num_fewshot, "must be ≥ 0, or null.")


TASKS = (
    "perplexity",
    "length",
    "recall",
    "induction",
    "selective_copying",
    "passkey",
    "last_word",
    "harness",
    "training",
)


@dataclass
class EvalConfig:
    """Everything ``python -m eval`` takes."""

    checkpoint: str | None = None
    """A run folder (its newest valid checkpoint), one checkpoint, a model's folder of transformers
    or mamba-ssm, or its name on the hub."""
    checkpoints: list[str] = field(default_factory=list)
    """Several of them, to be compared in one report."""
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    output: str | None = None
    """JSON file; default eval-STEP.json in the run's folder, numbered if there is one already."""
    report: str | None = None
    """Folder for report.md, report.html and PNG figures; default eval-report where there are
    several checkpoints, none where there is one."""
    form: Form = Form.parallel
    """parallel, or recurrent: one token after another. The results agree."""
    chunk: int = 4096
    """Tokens read at once where a text or example is longer; memory only."""
    seed: int = 0
    """Of the synthetic examples."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` …"""
    dtype: str = "auto"
    """``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float64``."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    recall: RecallEvalConfig = field(default_factory=RecallEvalConfig)
    induction: InductionEvalConfig = field(default_factory=InductionEvalConfig)
    selective_copying: SelectiveCopyingEvalConfig = field(
        default_factory=SelectiveCopyingEvalConfig
    )
    passkey: PasskeyConfig = field(default_factory=PasskeyConfig)
    last_word: LastWordConfig = field(default_factory=LastWordConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def validate(self) -> None:
        """Check every value that can be checked without a model.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        if (self.checkpoint is None) == (not self.checkpoints):
            raise ConfigError(
                "checkpoint",
                self.checkpoint,
                "give checkpoint=… on the command line, or several as checkpoints=[a,b], not both.",
            )
        if self.output is not None and self.checkpoints:
            raise ConfigError(
                "output", self.output, "is one run's file; with checkpoints=[…] use report=FOLDER."
            )
        if not self.tasks:
            raise ConfigError("tasks", self.tasks, f"is empty; known: {', '.join(TASKS)}.")
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(
                    "tasks", task, f"no such task.{closest(task, TASKS)} Known: {', '.join(TASKS)}."
                )
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "must be ≥ 0.")
        if self.chunk < 1:
            raise ConfigError("chunk", self.chunk, "must be ≥ 1.")
        for task in self.tasks:
            if task != "training":  # which has nothing to set
                getattr(self, task).validate()


def _check_preset(preset: str | None, known: Sequence[str] | dict[str, Any], key: str) -> None:
    if preset is not None and preset not in known:
        raise ConfigError(
            f"{key}.preset",
            preset,
            f"no such preset.{closest(preset, known)} Known: {', '.join(known)}.",
        )


def _check_list(values: Sequence[int], key: str, least: int) -> None:
    if not values or min(values) < least:
        raise ConfigError(key, list(values), f"give one or more numbers of {least} or more.")
