"""The tasks by name: from a config and a loaded run to a result."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Final

from eval.config import EvalConfig, Window
from eval.induction import AccuracyResult, evaluate_induction, evaluate_selective_copying
from eval.last_word import evaluate_last_word
from eval.length import evaluate_length
from eval.passkey import evaluate_passkey
from eval.perplexity import (
    PerplexityResult,
    evaluate_perplexity,
    held_out_documents,
    source_documents,
)
from eval.published import published
from eval.recall import evaluate_recall
from eval.report import step_of
from eval.result import Curve, Grid, TaskResult, finite
from eval.training_log import read_training_log
from mamba2lm.data import DataConfig, Tokenizer
from mamba2lm.inference import LoadedRun
from mamba2lm.schema import ConfigError, from_mapping


def run_task(name: str, config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Run one task.

    Args:
        name: One of ``eval.config.TASKS``.
        config: Checked.
        run: What to evaluate.

    Raises:
        ConfigError: The task does not fit the run, or its text cannot be read.
    """
    return _RUNNERS[name](config, run)


def run_perplexity(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Score the text that the config names, or the run's own held-out text."""
    tokenizer = _tokenizer(run, "perplexity")
    data = _data(run)
    documents = _documents(config.perplexity.sources, "perplexity.sources", data)
    result = evaluate_perplexity(
        run.model, tokenizer, documents, config.perplexity,
        length=data.sequence_length, form=config.form, chunk=config.chunk,
    )  # fmt: skip
    return TaskResult(
        perplexity_values(result),
        [_perplexity_grid(result), _context_grid(result)],
        [
            Curve(
                f"Loss by context ({result.window} windows)",
                "tokens of context", "nats per token",
                [part.most for part in result.by_context],
                [part.loss for part in result.by_context],
            )
        ],
        {
            f"token perplexity ({result.window})": result.token_perplexity,
            f"word perplexity ({result.window})": result.word_perplexity,
            f"bits per byte ({result.window})": result.bits_per_byte,
        },
    )  # fmt: skip


def perplexity_values(result: PerplexityResult) -> dict[str, Any]:
    """Return a result's counts and its three figures as plain values."""
    return {
        **dataclasses.asdict(result),
        "token_perplexity": finite(result.token_perplexity),
        "word_perplexity": finite(result.word_perplexity),
        "bits_per_byte": finite(result.bits_per_byte),
    }


def run_length(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Score text in windows of growing length."""
    tokenizer = _tokenizer(run, "length")
    data = _data(run)
    result = evaluate_length(
        run.model, tokenizer, _documents(config.length.sources, "length.sources", data),
        config.length, length=data.sequence_length, form=config.form, chunk=config.chunk,
    )  # fmt: skip
    rows = [
        [
            f"{w.multiple}×",
            f"{w.length:,}",
            f"{w.windows:,}",
            f"{w.loss:.4f}",
            f"{w.last_loss:.4f}",
            f"{w.last_loss_short:.4f}",
        ]
        for w in result.windows
    ]
    if result.carried_loss is not None:
        rows.append(["carried", f"{result.tokens:,}", "1", f"{result.carried_loss:.4f}", "", ""])
    xs = [float(w.length) for w in result.windows]
    figure = ("Loss beyond the training length", "tokens in a window", "nats per token")
    curves = [Curve(*figure, xs, [w.loss for w in result.windows], "from nothing")]
    headline = {f"loss in windows of {w.multiple}×": w.loss for w in result.windows}
    if result.carried_loss is not None:
        headline["loss with carried state"] = result.carried_loss
        curves.append(Curve(*figure, xs, [result.carried_loss] * len(xs), "carried state"))
    grid = Grid(
        f"Length (1× = {result.length:,} tokens, {result.tokens:,} scored)",
        [
            "window",
            "tokens",
            "windows",
            "loss",
            f"loss of the last {result.length:,}",
            f"the same in {result.windows[0].multiple}×",
        ],
        rows,
        ["loss"],
    )
    return TaskResult(dataclasses.asdict(result), [grid], curves, headline)


def run_recall(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Ask associative-recall questions."""
    results = evaluate_recall(
        run.model, config.recall, seed=config.seed, form=config.form, chunk=config.chunk
    )
    lengths = list(dict.fromkeys(r.length for r in results))
    grid = Grid(
        f"Associative recall (length {', '.join(map(str, lengths))}, "
        f"{results[0].vocab_size:,} ids)",
        ["length", "pairs", "questions", "correct", "accuracy"],
        [
            [str(r.length), str(r.n_pairs), f"{r.questions:,}", f"{r.correct:,}",
             f"{r.accuracy:.4f}"]
            for r in results
        ],
        ["accuracy"],
    )  # fmt: skip
    curve = Curve(
        "Associative recall", "pairs", "accuracy",
        [float(r.n_pairs) for r in results], [r.accuracy for r in results],
    )  # fmt: skip
    return TaskResult(
        [{**dataclasses.asdict(r), "accuracy": r.accuracy} for r in results],
        [grid],
        [curve],
        {f"recall of {r.n_pairs} pairs in {r.length}": r.accuracy for r in results},
        # The fast sets are of the Mamba-2 paper's figure.
        published("recall", "mamba2" if config.recall.preset == "fast" else config.recall.preset),
    )


def run_induction(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Ask induction questions at each length."""
    results = evaluate_induction(
        run.model, config.induction, seed=config.seed, form=config.form, chunk=config.chunk
    )
    curve = Curve(
        "Induction heads", "length", "accuracy",
        [float(r.length) for r in results], [r.accuracy for r in results],
    )  # fmt: skip
    return TaskResult(
        [{**dataclasses.asdict(r), "accuracy": r.accuracy} for r in results],
        [_accuracy_grid("Induction heads", results)],
        [curve],
        {f"induction at {r.length:,}": r.accuracy for r in results},
        published("induction", config.induction.preset),
    )


def run_selective_copying(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Ask for data tokens among noise."""
    result = evaluate_selective_copying(
        run.model, config.selective_copying, seed=config.seed, form=config.form, chunk=config.chunk
    )
    return TaskResult(
        {**dataclasses.asdict(result), "accuracy": result.accuracy},
        [_accuracy_grid("Selective copying", [result])],
        [],
        {f"selective copying in {result.length:,}": result.accuracy},
        published("selective_copying", config.selective_copying.preset),
    )


def run_passkey(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Hide numbers in text and ask for them."""
    results = evaluate_passkey(
        run.model, _tokenizer(run, "passkey"), config.passkey,
        seed=config.seed, form=config.form, chunk=config.chunk,
    )  # fmt: skip
    lengths = list(dict.fromkeys(r.length for r in results))
    depths = list(dict.fromkeys(r.depth for r in results))
    accuracy = {(r.length, r.depth): r.accuracy for r in results}
    mean = {n: sum(accuracy[n, d] for d in depths) / len(depths) for n in lengths}
    grid = Grid(
        f"Passkey retrieval ({results[0].examples} numbers a cell; columns: depth)",
        ["tokens", *(f"{depth:g}" for depth in depths), "all"],
        [[f"{n:,}", *(f"{accuracy[n, d]:.2f}" for d in depths), f"{mean[n]:.4f}"] for n in lengths],
        ["all"],
    )
    curve = Curve(
        "Passkey retrieval", "tokens", "accuracy", [float(n) for n in lengths], list(mean.values())
    )
    return TaskResult(
        [{**dataclasses.asdict(r), "accuracy": r.accuracy} for r in results],
        [grid],
        [curve],
        {f"passkey at {n:,}": value for n, value in mean.items()},
        published("passkey", config.passkey.preset),
    )


def run_last_word(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Predict last words."""
    tokenizer = _tokenizer(run, "last_word")
    documents = source_documents(
        config.last_word.sources, "last_word.sources", _data(run).cache_dir
    )
    result = evaluate_last_word(
        run.model, tokenizer, documents, config.last_word, form=config.form, chunk=config.chunk
    )
    grid = Grid(
        "Last words",
        ["texts", "tokens", "accuracy", "perplexity"],
        [[f"{result.documents:,}", f"{result.tokens:,}", f"{result.accuracy:.4f}",
          f"{result.perplexity:,.3f}"]],
        ["accuracy", "perplexity"],
    )  # fmt: skip
    return TaskResult(
        {
            **dataclasses.asdict(result),
            "accuracy": result.accuracy,
            "perplexity": finite(result.perplexity),
        },
        [grid],
        [],
        {"last-word accuracy": result.accuracy, "last-word perplexity": result.perplexity},
        published("last_word", config.last_word.preset),
    )


def run_harness(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Run tasks of lm-evaluation-harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks", "harness", "needs `pip install -e '.[harness]'`.")
    from eval.harness import evaluate_harness  # slow to import, and optional

    found = evaluate_harness(
        run.model, _tokenizer(run, "harness"), config.harness, form=config.form, seed=config.seed
    )
    rows = [
        [task, metric.replace(",none", ""), f"{value:.4f}"]
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    return TaskResult(
        found,
        [Grid("lm-evaluation-harness", ["task", "metric", "value"], rows, ["value"])],
        [],
        {f"{task} {metric}": float(value) for task, metric, value in rows},
    )


def run_training(config: EvalConfig, run: LoadedRun) -> TaskResult:
    """Read what the run's metrics say of its training."""
    log = read_training_log(run.folder, step_of(run.folder))
    gib = log.memory_bytes / 2**30
    grid = Grid(
        "Training",
        ["steps", "tokens", "seconds", "tokens/s", "MFU", "GiB", "loss", "held-out loss"],
        [
            [
                f"{log.steps:,}",
                f"{log.tokens:,}",
                f"{log.seconds:,.0f}",
                f"{log.tokens_per_second:,.0f}",
                "" if log.mfu is None else f"{log.mfu:.1%}",
                f"{gib:.2f}",
                f"{log.curve[-1][1]:.4f}" if log.curve else "",
                f"{log.held_out[-1][1]:.4f}" if log.held_out else "",
            ]
        ],
        ["tokens/s"],
    )
    headline = {"tokens per second": log.tokens_per_second, "GiB": gib}
    if log.held_out_bits_per_byte is not None:
        headline["held-out bits per byte"] = log.held_out_bits_per_byte
    curves = []
    for title, points in (("Loss in training", log.curve), ("Held-out loss", log.held_out)):
        if points:
            xs, ys = [float(tokens) for tokens, _ in points], [loss for _, loss in points]
            curves.append(Curve(title, "tokens", "nats per token", xs, ys, log_x=False))
    values = {**dataclasses.asdict(log), "best_held_out": log.best_held_out}
    return TaskResult(values, [grid], curves, headline)


_RUNNERS: Final[dict[str, Callable[[EvalConfig, LoadedRun], TaskResult]]] = {
    "perplexity": run_perplexity,
    "length": run_length,
    "recall": run_recall,
    "induction": run_induction,
    "selective_copying": run_selective_copying,
    "passkey": run_passkey,
    "last_word": run_last_word,
    "harness": run_harness,
    "training": run_training,
}


def _data(run: LoadedRun) -> DataConfig:
    return from_mapping(DataConfig, run.config.get("data"), "data")


def _documents(sources: list[Any], key: str, data: DataConfig) -> Iterable[str]:
    if sources:
        return source_documents(sources, key, data.cache_dir)
    return held_out_documents(data, key)


def _tokenizer(run: LoadedRun, task: str) -> Tokenizer:
    if run.tokenizer is None:
        raise ConfigError(
            "tasks",
            task,
            "the model was trained without a tokenizer, on a synthetic task; use tasks=[recall], "
            "[induction] or [selective_copying].",
        )
    return run.tokenizer


def _perplexity_grid(result: PerplexityResult) -> Grid:
    context = f"{result.window} windows of {result.length}"
    if result.window == Window.streaming.value:
        context = f"streaming, {result.length} tokens at once"
    elif result.stride != result.length:
        context += f", stride {result.stride}"
    figures = ["token perplexity", "word perplexity", "bits per byte"]
    row = [
        f"{result.documents:,}",
        f"{result.tokens:,}",
        f"{result.words:,}",
        f"{result.bytes:,}",
        f"{result.token_perplexity:,.3f}",
        f"{result.word_perplexity:,.3f}",
        f"{result.bits_per_byte:.4f}",
    ]
    return Grid(
        f"Perplexity ({context})", ["documents", "tokens", "words", "bytes", *figures], [row],
        figures,
    )  # fmt: skip


def _context_grid(result: PerplexityResult) -> Grid:
    rows = [
        [
            f"{part.least:,}" if part.least == part.most else f"{part.least:,} to {part.most:,}",
            f"{part.tokens:,}",
            f"{part.loss:.4f}",
        ]
        for part in result.by_context
    ]
    return Grid("Loss by context", ["tokens of context", "tokens", "loss"], rows, ["loss"])


def _accuracy_grid(title: str, results: list[AccuracyResult]) -> Grid:
    rows = [
        [f"{r.length:,}", f"{r.questions:,}", f"{r.correct:,}", f"{r.accuracy:.4f}"]
        for r in results
    ]
    return Grid(title, ["length", "questions", "correct", "accuracy"], rows, ["accuracy"])
