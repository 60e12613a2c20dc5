"""What a run reports: metrics.jsonl always, lines or a bar on the screen, wandb when asked."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mamba2lm.schema import ConfigError

log = logging.getLogger(__name__)


class Tracking(Enum):
    """Where metrics go besides metrics.jsonl."""

    none = "none"
    wandb = "wandb"


class Tracker(Protocol):
    """Something that takes a row of metrics."""

    def log(self, row: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """Weights & Biases; honours WANDB_MODE=offline."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb
        from wandb.errors import UsageError

        try:
            self.run = wandb.init(
                project="mamba2lm", name=run_dir.name, dir=str(run_dir), config=config,
                id=_wandb_id(run_dir), resume="allow",
            )  # fmt: skip
        except UsageError as error:
            raise ConfigError(
                "tracking", "wandb", f"{error} Log in with `wandb login` or set WANDB_MODE=offline."
            ) from error

    def log(self, row: dict[str, Any], step: int) -> None:
        """Send one row."""
        self.run.log(row, step=step)

    def finish(self) -> None:
        """Close the run."""
        self.run.finish()


class Metrics:
    """Append rows to metrics.jsonl, show them, and pass them on."""

    def __init__(self, path: Path, *, max_steps: int, tracker: Tracker | None = None) -> None:
        """Open the log.

        Args:
            path: metrics.jsonl; rows are appended.
            max_steps: Length of the run, for the display.
            tracker: Gets every row too.
        """
        self.path = path
        self.tracker = tracker
        self.file = path.open("a", encoding="utf-8")
        self.max_steps = max_steps
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.progress.add_task("training", total=max_steps, figures="")
            self.progress.start()

    def write(self, row: dict[str, Any]) -> None:
        """Record one row; it has ``step`` and either training or ``val_*`` figures."""
        clean = {k: _json_number(v) for k, v in row.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
        line = describe(row)
        if self.progress is None:
            log.info("step %d/%d  %s", row["step"], self.max_steps, line)
        elif "val_loss" in row:
            log.info("step %d  %s", row["step"], line)
        else:
            self.progress.update(self.task, completed=row["step"], figures=line)

    def close(self) -> None:
        """Close the file, the display and the tracker."""
        self.file.close()
        if self.progress:
            self.progress.stop()
        if self.tracker:
            self.tracker.finish()


def describe(row: dict[str, Any]) -> str:
    """Write a row's main figures on one line."""
    if "val_loss" in row:
        bits = row.get("val_bits_per_byte")
        text = f"held-out loss {row['val_loss']:.4f}  perplexity {row['val_perplexity']:.2f}"
        return text + (f"  bits per byte {bits:.3f}" if bits is not None else "")
    mfu = row.get("mfu")
    return (
        f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s" + (f"  MFU {mfu:.0%}" if mfu is not None else "")
    )


def truncate_metrics(path: Path, step: int) -> None:
    """Drop rows of steps after ``step``, which a resumed run will write again."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def truncate_samples(path: Path, step: int) -> None:
    """Drop samples of steps after ``step``, which a resumed run will write again."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for heading in re.finditer(r"^=== step (\d+)$", text, re.MULTILINE):
        if int(heading[1]) > step:
            text = text[: heading.start()]
            break
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, leaving out a last line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: leaving out an unreadable line", path)
    return rows


def plot_losses(metrics: Path, target: Path) -> None:
    """Draw training and held-out loss (nats per token) over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics)
    train = [(r["tokens"] / 1e6, r["loss"]) for r in rows if r.get("loss") is not None]
    held_out = [(r["tokens"] / 1e6, r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axis.plot(*zip(*train, strict=True), color="#7a9cc6", linewidth=1, label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color="#b3452c", marker="o", ms=3, label="held out")
        bits = [r["val_bits_per_byte"] for r in rows if r.get("val_bits_per_byte") is not None]
        if bits:
            axis.set_title(f"held out: {bits[-1]:.3f} bits per byte", fontsize=10)
    axis.set(xlabel="tokens, millions", ylabel="loss, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if train or held_out:
        axis.legend(frameon=False)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value


def _wandb_id(run_dir: Path) -> str:
    import hashlib

    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
