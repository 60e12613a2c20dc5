"""Small corpora, models, trainers and commands that the training tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import train
from mamba2lm.data import (
    Corpus,
    DataConfig,
    DataKind,
    RecallConfig,
    TokenizerConfig,
    TokenizerKind,
    prepare_data,
)
from mamba2lm.distributed import ParallelConfig, World
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.config import default_mixers
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.metrics import Tracker
from mamba2lm.training.optimizer import OptimizerConfig
from mamba2lm.training.precision import Precision
from mamba2lm.training.run_folder import open_run
from mamba2lm.training.schedule import ScheduleConfig
from mamba2lm.training.trainer import Trainer
from tests.data.texts import prose
from tests.processes import ROOT

TINY_MIXERS = {
    "M": {"d_state": 16, "headdim": 16, "chunk_size": 16},
    "S": {"d_state": 8},
    "A": {"n_heads": 2},
    "F": {"d_ff": 64},
}


def tiny_config(pattern: str = "M", *, vocab_size: int = 257, **changes: Any) -> ModelConfig:
    """Return a model of two repetitions of a pattern, 32 wide."""
    mixers = default_mixers()
    for letter, fields in TINY_MIXERS.items():
        mixers[letter] |= fields
    values = {"d_model": 32, "n_layers": 2 * len(pattern), **changes}
    return ModelConfig(pattern=pattern, vocab_size=vocab_size, mixers=mixers, **values)


def tiny_model(pattern: str = "M", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """Return such a model with weights."""
    model = LanguageModel(tiny_config(pattern, **changes))
    model.init_weights(seed)
    return model


def text_file(folder: Path, words: int = 6000) -> Path:
    """Write made-up prose and return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prose.txt"
    if not file.exists():
        file.write_text(prose(0, words), encoding="utf-8")
    return file


def documents_file(folder: Path, sizes: Iterable[int]) -> Path:
    """Cut the prose into documents of so many characters; return their file."""
    text = text_file(folder).read_text(encoding="utf-8")
    file = folder / "documents.jsonl"
    if not file.exists():
        parts, at = [], 0
        for size in sizes:
            parts.append(text[at : at + size])
            at += size
        file.write_text("".join(f'{{"text": {part!r}}}\n'.replace("'", '"') for part in parts))
    return file


def text_corpus(folder: Path, *, sequence_length: int = 32) -> Corpus:
    """Return made-up prose as bytes."""
    config = DataConfig(
        sources=[str(text_file(folder))],
        tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        sequence_length=sequence_length,
        cache_dir=str(folder / "cache"),
    )
    return prepare_data(config, seed=0)


def recall_corpus() -> Corpus:
    """Return a small associative-recall task."""
    recall = RecallConfig(vocab_size=64, length=32, n_pairs=4, n_train=512, n_test=24)
    return prepare_data(DataConfig(kind=DataKind.recall, recall=recall), seed=0)


def make_trainer(
    run_dir: Path,
    corpus: Corpus,
    model: LanguageModel | None = None,
    *,
    resume: str = "auto",
    optimizer: OptimizerConfig | None = None,
    tracker: Tracker | None = None,
    parallel: ParallelConfig | None = None,
    num_workers: int = 0,
    write_sample: Callable[[LanguageModel], str] | None = None,
    cpu: bool = True,
    **training: Any,
) -> Trainer:
    """Build a trainer the way the command does, for 12 steps of 4 sequences in float32.

    It trains on the CPU unless ``cpu`` is false.
    """
    settings: dict[str, Any] = {
        "max_steps": 12, "batch_size": 4, "precision": Precision.fp32, "log_every": 1,
        "eval_every": 0, "save_every": 100, "peak_tflops": 1.0, **training,
    }  # fmt: skip
    if model is None:
        model = tiny_model(vocab_size=corpus.vocab_size)
    accelerator = Accelerator(cpu=cpu)
    world = World(accelerator.process_index, accelerator.num_processes, accelerator.device)
    run = world.decide(lambda: open_run(str(run_dir), resume))
    if world.is_main:
        run.write_config({"model": model.config.resolved(), "training": {}})
    return Trainer(
        model,
        corpus,
        config=TrainingConfig(**settings),
        optimizer=optimizer or OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=2),
        run=run,
        accelerator=accelerator,
        parallel=parallel,
        num_workers=num_workers,
        tracker=lambda: tracker,
        write_sample=write_sample,
    )


class Rows:
    """A tracker that keeps the rows and calls a function at each."""

    def __init__(self, at_row: Callable[[int], None] = lambda step: None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.at_row = at_row
        self.finished = False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append({"step": step, **row})
        self.at_row(step)

    def finish(self) -> None:
        self.finished = True


def tiny_run(text: Path, run_dir: Path, *changes: str) -> list[str]:
    """Return the arguments of a training command that takes a second or two."""
    values = {
        "run_dir": str(run_dir),
        "data.sources": f"[{text}]",
        "data.tokenizer.kind": "bytes",
        "data.sequence_length": "128",
        "model.pattern": "M",
        "model.d_model": "64",
        "model.n_layers": "2",
        "model.mixers.M.d_state": "16",
        "model.mixers.M.headdim": "16",
        "model.mixers.M.chunk_size": "16",
        "optimizer.kind": "adamw",
        "optimizer.learning_rate": "0.003",
        "schedule.kind": "cosine",
        "schedule.warmup_steps": "2",
        "training.max_steps": "40",
        "training.batch_size": "8",
        "training.micro_batch_size": "null",
        "training.precision": "fp32",
        "training.activation_checkpointing": "false",
        "training.compile": "false",
        "training.threads": "1",
        "training.log_every": "1",
        "training.eval_every": "10",
        "training.eval_batches": "4",
        "training.save_every": "10",
        "training.sample_every": "20",
        "training.sample_tokens": "24",
        "training.keep_last": "2",
    }
    for change in changes:
        key, _, value = change.partition("=")
        values[key] = value
    # Without an experiment, so that retuning the quickstart changes no test.
    return ["~experiment", *(f"{key}={value}" for key, value in values.items())]


def run_here(arguments: Sequence[str]) -> int:
    """Run ``train.py`` inside this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        with pytest.raises(SystemExit) as stopped:
            train.main()
    code = stopped.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def start(
    arguments: Sequence[str], *, launcher: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start ``python [launcher] train.py …`` as a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, code: int = 0, timeout: float = 180) -> str:
    """Wait for a command, check its exit code and return its standard error."""
    _, stderr = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{stderr}"
    return stderr


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file's content by its path in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
