"""What a run's metrics say of its training: so that runs are compared in one table and figure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba2lm.schema import ConfigError
from mamba2lm.training.metrics import read_metrics

METRICS = "metrics.jsonl"


@dataclass
class TrainingLog:
    """A run up to a checkpoint."""

    steps: int
    tokens: int
    seconds: float
    """In steps, without validation and saving."""
    tokens_per_second: float
    """Median over the rows of the log; the first, in which kernels compile, left out."""
    mfu: float | None
    """Median likewise: model FLOP/s over the device's peak."""
    memory_bytes: int
    """Peak on the device; of a CPU, of the process."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Tokens seen and training loss, nats per token, mean since the row before."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Tokens seen and held-out loss."""
    held_out_bits_per_byte: float | None = None
    """At the last validation."""

    @property
    def best_held_out(self) -> float | None:
        """Lowest held-out loss."""
        return min((loss for _, loss in self.held_out), default=None)


def read_training_log(checkpoint: Path, step: int | None) -> TrainingLog:
    """Read the metrics of the run that a checkpoint belongs to.

    Args:
        checkpoint: Its folder.
        step: Its step, at which to stop reading; None reads everything.

    Raises:
        ConfigError: The run has no metrics, as a model from the hub has none.
    """
    path = _run_of(checkpoint) / METRICS
    if not path.is_file():
        raise ConfigError("tasks", "training", f"there is no {path}; leave this task out.")
    rows = [row for row in read_metrics(path) if step is None or row["step"] <= step]
    steps: list[dict[str, Any]] = [row for row in rows if "tokens_per_second" in row]
    if not steps:
        raise ConfigError("tasks", "training", f"{path} holds no step; leave this task out.")
    held_out = [row for row in rows if row.get("val_loss") is not None]
    settled = steps[1:] or steps
    utilisation = [row["mfu"] for row in settled if row.get("mfu") is not None]
    return TrainingLog(
        steps=steps[-1]["step"],
        tokens=steps[-1]["tokens"],
        seconds=steps[-1]["seconds"],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in settled),
        mfu=statistics.median(utilisation) if utilisation else None,
        memory_bytes=max(row["memory_bytes"] for row in steps),
        curve=[(row["tokens"], row["loss"]) for row in steps if row["loss"] is not None],
        held_out=[(row["tokens"], row["val_loss"]) for row in held_out],
        held_out_bits_per_byte=held_out[-1].get("val_bits_per_byte") if held_out else None,
    )


def _run_of(checkpoint: Path) -> Path:
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
