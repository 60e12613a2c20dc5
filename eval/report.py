"""Results as a table for people and as JSON with all it takes to repeat them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from eval.config import EvalConfig
from eval.perplexity import PerplexityResult
from eval.recall import RecallResult
from mamba2lm import __version__
from mamba2lm.inference import LoadedRun


def perplexity_values(result: PerplexityResult) -> dict[str, Any]:
    """Return a result's counts and its three figures as plain values."""
    return {
        **dataclasses.asdict(result),
        "token_perplexity": _finite(result.token_perplexity),
        "word_perplexity": _finite(result.word_perplexity),
        "bits_per_byte": _finite(result.bits_per_byte),
    }


def recall_values(results: Sequence[RecallResult]) -> list[dict[str, Any]]:
    """Return results as plain values, one mapping a number of pairs."""
    return [{**dataclasses.asdict(result), "accuracy": result.accuracy} for result in results]


def perplexity_table(result: PerplexityResult) -> Table:
    """Return the table of a perplexity result."""
    context = f"{result.window} windows of {result.length}"
    if result.stride is None:
        context = f"streaming, {result.length} tokens at once"
    elif result.stride != result.length:
        context += f", stride {result.stride}"
    table = Table(title=f"Perplexity ({context})")
    for name in ("documents", "tokens", "words", "bytes"):
        table.add_column(name, justify="right")
    for name in ("token perplexity", "word perplexity", "bits per byte"):
        table.add_column(name, justify="right", style="bold")
    table.add_row(
        f"{result.documents:,}",
        f"{result.tokens:,}",
        f"{result.words:,}",
        f"{result.bytes:,}",
        f"{result.token_perplexity:,.3f}",
        f"{result.word_perplexity:,.3f}",
        f"{result.bits_per_byte:.4f}",
    )
    return table


def recall_table(results: Sequence[RecallResult]) -> Table:
    """Return the table of recall results."""
    table = Table(
        title=f"Associative recall (length {results[0].length}, {results[0].vocab_size:,} ids)"
    )
    for name in ("pairs", "questions", "correct"):
        table.add_column(name, justify="right")
    table.add_column("accuracy", justify="right", style="bold")
    for result in results:
        table.add_row(
            str(result.n_pairs),
            f"{result.questions:,}",
            f"{result.correct:,}",
            f"{result.accuracy:.4f}",
        )
    return table


def show(tables: Sequence[Table]) -> None:
    """Write tables to standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width; do not fold figures
    for table in tables:
        console.print(table)


def document(
    config: EvalConfig, run: LoadedRun, results: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """Return everything needed to repeat an evaluation, with its results.

    Args:
        config: As it was run.
        run: What was evaluated.
        results: Task → plain values.
        seconds: Task → wall-clock time.
    """
    weight = run.model.embedding.weight
    on_gpu = weight.device.type == "cuda"
    return {
        "checkpoint": str(run.folder.resolve()),
        "step": step_of(run.folder),
        "model": {
            "pattern": run.model.config.letters,
            "parameters": run.model.parameter_count(),
            "fingerprint": run.fingerprint,
        },
        "results": results,
        "seconds": {task: round(value, 3) for task, value in seconds.items()},
        "config": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "mamba2lm": __version__,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(weight.device) if on_gpu else platform.machine(),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    }


def write(values: dict[str, Any], path: Path) -> None:
    """Write the JSON file beside its name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def default_output(checkpoint: Path) -> Path:
    """Return a new file name in the run's folder, or beside a checkpoint that is in no run.

    The checkpoint's own folder is hashed and never written to.
    """
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    step = step_of(checkpoint)
    stem = f"eval-{checkpoint.name if step is None else step}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}.{number}.json"
    return path


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None where there is none."""
    found = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def git_commit() -> str | None:
    """Return the commit of this program's folder, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _finite(value: float) -> float | None:
    """Return None for what JSON has no word for."""
    return value if math.isfinite(value) else None
