"""The root schema of ``python -m eval.sweep``."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mamba2lm.data import InductionConfig, RecallConfig, SelectiveCopyingConfig, SyntheticConfig
from mamba2lm.models import ModelConfig
from mamba2lm.schema import ConfigError, from_mapping
from mamba2lm.training.precision import Precision

T = TypeVar("T")


class SweepTask(enum.Enum):
    """What the models learn."""

    recall = "recall"
    induction = "induction"
    selective_copying = "selective_copying"


class Order(enum.Enum):
    """How the stages of a data set follow each other."""

    curriculum = "curriculum"
    """One after another."""
    mixed = "mixed"
    """Batches of all stages in random order."""


class Decay(enum.Enum):
    """Shape of the learning rate, from its peak at the first step."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class StageConfig:
    """Examples of one shape, to train on."""

    length: int = 256
    items: int = 16
    """Pairs of recall, data tokens of selective copying; induction has none."""
    n_examples: int = 100_000
    """Different examples."""
    epochs: int = 1
    batch_size: int = 256

    @property
    def batch(self) -> tuple[int, int]:
        """Shape of a batch, by which steps share a graph."""
        return self.batch_size, self.length


@dataclass
class TestConfig:
    """Examples of one shape, to be asked."""

    length: int = 256
    items: int = 16
    n_examples: int = 3000


@dataclass
class DataSetConfig:
    """What one model is trained on and asked."""

    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    tests: list[TestConfig] = field(default_factory=lambda: [TestConfig()])


@dataclass
class ModelEntry:
    """An architecture: a pattern and what its letters differ in from their defaults."""

    pattern: str = "M"
    n_layers: int = 2
    embedding_std: float = 0.02
    """Of the initial embedding, which is the head too."""
    mixers: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepConfig:
    """Everything ``python -m eval.sweep`` takes."""

    output: str = "runs/sweep"
    """Folder of cells/, summary.json, summary.md and accuracy.png; a second start goes on in it."""
    preset: str | None = None
    """Names the published figures to stand beside ours."""
    task: SweepTask = SweepTask.recall
    vocab_size: int = 8192
    datasets: dict[str, Any] = field(default_factory=dict)
    """By name, mappings of `DataSetConfig`'s fields; each is trained on apart."""
    order: Order = Order.curriculum
    models: dict[str, Any] = field(default_factory=dict)
    """By name, as in the figure's legend, mappings of `ModelEntry`'s fields."""
    widths: list[int] = field(default_factory=lambda: [64])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    """In the order they are tried in: the likeliest first."""
    seeds: list[int] = field(default_factory=lambda: [0])
    decay: Decay = Decay.cosine
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float | None = None
    """Clip gradients; null does not, as in Zoology."""
    evaluate_every: int = 256
    """Steps between evaluations."""
    stop_at: float | None = 0.99
    """End a cell whose accuracy on every test is this high; null trains to the end."""
    skip_solved: bool = False
    """Leave out the learning rates that are left once one has reached ``stop_at``."""
    longest_growing: int = 16384
    """Longest test of a model whose state grows; longer ones are left out."""
    chunk: int = 8192
    """Tokens of a test example read at once; longer ones stream through the state."""
    concurrent: int = 8
    """Cells trained at the same time on a GPU, each in a stream of its own; 1 on a CPU."""
    graphs: bool = True
    """Replay each training step as a CUDA graph."""
    budget_s: float | None = None
    """Stop after so many seconds; null finishes everything; 0 only summarises."""
    data_seed: int = 0
    precision: Precision = Precision.auto
    device: str = "auto"

    def validate(self) -> None:
        """Check every value, every task and every model, and type what ``Any`` left open.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        for name in ("datasets", "models", "widths", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "is empty; sweep=NAME gives a preset.")
        if min(self.learning_rates) <= 0:
            raise ConfigError("learning_rates", self.learning_rates, "must be positive.")
        for name in ("evaluate_every", "concurrent", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be ≥ 1.")
        if self.budget_s is not None and self.budget_s < 0:
            raise ConfigError("budget_s", self.budget_s, "must be ≥ 0, or null.")
        self.datasets = _typed(DataSetConfig, self.datasets, "datasets")
        self.models = _typed(ModelEntry, self.models, "models")
        for name, data in self.datasets.items():
            if not data.stages or not data.tests:
                raise ConfigError(f"datasets.{name}", "", "needs stages and tests.")
            for i, stage in enumerate(data.stages):
                key = f"datasets.{name}.stages[{i}]"
                self.example(stage).check(key)
                if not 1 <= stage.batch_size <= stage.n_examples:
                    raise ConfigError(
                        f"{key}.batch_size", stage.batch_size, f"use 1 to {stage.n_examples}."
                    )
                if stage.epochs < 1:
                    raise ConfigError(f"{key}.epochs", stage.epochs, "must be ≥ 1.")
            for i, test in enumerate(data.tests):
                self.example(test).check(f"datasets.{name}.tests[{i}]")
        for name in self.models:
            for width in self.widths:
                self.model(name, width)

    def example(self, shape: StageConfig | TestConfig) -> SyntheticConfig:
        """Return the generator's config for examples of one shape."""
        size = {"vocab_size": self.vocab_size, "length": shape.length, "n_test": shape.n_examples}
        if self.task is SweepTask.recall:
            return RecallConfig(**size, n_pairs=shape.items)
        if self.task is SweepTask.induction:
            return InductionConfig(**size)
        return SelectiveCopyingConfig(**size, n_tokens=shape.items)

    def model(self, name: str, width: int) -> ModelConfig:
        """Return the checked model config of an entry at one width.

        Raises:
            ConfigError: A value that cannot be.
        """
        values = {
            **dataclasses.asdict(self.models[name]),
            "d_model": width,
            "vocab_size": self.vocab_size,
        }
        config = from_mapping(ModelConfig, values, f"models.{name}")
        config.validate()
        return config


def _typed(cls: type[T], values: dict[str, Any], key: str) -> dict[str, T]:
    return {
        name: value if isinstance(value, cls) else from_mapping(cls, value, f"{key}.{name}")
        for name, value in values.items()
    }
