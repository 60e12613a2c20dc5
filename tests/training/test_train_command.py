"""``python train.py`` as a process: what a run leaves, and how it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from wandb.proto import wandb_internal_pb2

from mamba2lm.data import Tokenizer
from mamba2lm.models.checkpoint import WEIGHTS, checkpoints_of, load_model, pointed, verify
from mamba2lm.training.checkpoint import OPTIMIZER
from mamba2lm.training.metrics import read_metrics
from tests.training.helpers import finish, run_here, start, text_file, tiny_run, tree


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"), words=20_000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Return the folder of a run of 40 steps that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    stderr = finish(start(tiny_run(text, run)))
    assert "step 40/40  loss" in stderr
    assert f"generate.py checkpoint={run}" in stderr
    return run


def by_step(run: Path, figure: str) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row[figure] for row in rows if figure in row}


def test_a_run_folder_holds_everything(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "tokenizer", "checkpoints",
    }  # fmt: skip
    config: Any = OmegaConf.load(finished / "config.yaml")
    assert config.model.d_model == 64
    assert config.model.vocab_size == 257
    assert list(config.model.mixers) == ["M"]
    assert config.training.max_steps == 40
    assert (finished / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (finished / "loss.png").stat().st_size > 5000
    samples = (finished / "samples.txt").read_text()
    assert samples.count("=== step ") == 2
    assert samples.startswith("=== step 20\nThe")
    assert "\n\n=== step 40\nThe" in samples
    assert Tokenizer.load(finished / "tokenizer").vocab_size == 257


def test_metrics_hold_every_figure_and_the_loss_falls(finished: Path) -> None:
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row in rows:
        assert row["tokens"] == row["step"] * 8 * 128
        assert row["tokens_per_second"] > 100
        assert 0 < row["mfu"] < 1
        assert 2**26 < row["memory_bytes"] < 2**40
        assert 0 <= row["data_wait_fraction"] < 1
        assert row["grad_norm"] > 0
    rates = by_step(finished, "learning_rate")
    assert [rates[1], rates[2]] == pytest.approx([0.0015, 0.003])
    assert rates[40] == pytest.approx(0.0003)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert rows[0]["loss"] > 5.0
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.5
    held_out = [row for row in read_metrics(finished / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in held_out] == [10, 20, 30, 40]
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]
    assert all(row["val_bits_per_byte"] > 0 for row in held_out)


def test_checkpoints_are_whole_and_named_by_their_pointers(finished: Path) -> None:
    names = [path.name for path in checkpoints_of(finished)]
    assert names == ["step_00000030", "step_00000040"]
    for checkpoint in checkpoints_of(finished):
        verify(checkpoint)
        files = {path.name for path in checkpoint.iterdir()}
        assert files == {
            "config.yaml", "manifest.json", WEIGHTS, OPTIMIZER, "progress.json",
            "random.safetensors", "tokenizer",
        }  # fmt: skip
    assert pointed(finished, "latest") == finished / "checkpoints" / names[-1]
    held_out = by_step(finished, "val_loss")
    best = min(held_out, key=lambda step: held_out[step])
    assert pointed(finished, "best") == finished / "checkpoints" / f"step_{best:08d}"
    model = load_model(finished / "checkpoints" / names[-1])
    weights = load_file(finished / "checkpoints" / names[-1] / WEIGHTS)
    assert model.parameter_count() == sum(tensor.numel() for tensor in weights.values())


def wait_for_steps(run: Path, steps: int, process: Any) -> None:
    """Wait until a run has written so many rows."""
    metrics = run / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count('"loss"') < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
    finished: Path, text: Path, tmp_path: Path, workers: int
) -> None:
    run = tmp_path / "run"
    arguments = tiny_run(text, run, f"data.num_workers={workers}")
    process = start(arguments)
    wait_for_steps(run, 4, process)
    # As a scheduler does: to every process of the job, the readers included.
    os.killpg(process.pid, signal.SIGTERM)
    stderr = finish(process, code=75)
    assert "stopped by SIGTERM at step" in stderr
    stopped_at = max(by_step(run, "loss"))
    assert 4 <= stopped_at < 40
    assert checkpoints_of(run)[-1].name == f"step_{stopped_at:08d}"
    verify(checkpoints_of(run)[-1])

    if workers == 0:
        assert f"continuing from {checkpoints_of(run)[-1]}" in finish(start(arguments))
    else:
        assert run_here(arguments) == 0
    for name in (WEIGHTS, OPTIMIZER, "random.safetensors"):
        ours, theirs = (path / "checkpoints" / "step_00000040" / name for path in (run, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name
    for figure in ("loss", "grad_norm", "learning_rate", "val_loss", "tokens"):
        assert by_step(run, figure) == by_step(finished, figure), figure
    assert (run / "samples.txt").read_text() == (finished / "samples.txt").read_text()
    assert pointed(run, "best") == run / "checkpoints" / pointed(finished, "best").name  # type: ignore[union-attr]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_complete_run_says_so_and_stays_as_it_is(
    finished: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    arguments = tiny_run(text, finished, "optimizer.learning_rate=0.5")
    assert run_here(arguments) == 0
    assert "the run is complete: step 40 of 40" in capsys.readouterr().err
    assert tree(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == times


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["resume=never"], "holds a run; choose another folder, or resume=auto"),
        (["model.d_model=128"], "model.d_model=128: the run in"),
        (["model.mixers.M.d_state=32"], "model.mixers.M.d_state=32: the run in"),
        (["data.sequence_length=64"], "data.sequence_length=64: the run in"),
        (["optimizer.kind=muon"], "optimizer.kind='muon': the run in"),
        (["model.pattern=F"], "model.pattern='F': the run in"),
    ],
)
def test_a_run_is_never_replaced_by_another(
    finished: Path, text: Path, changes: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    changes = [*changes, "training.max_steps=50"]
    assert run_here(tiny_run(text, finished, *changes)) == 2
    line = one_line(capsys)
    assert says in line
    if "resume" not in changes[0]:
        assert " has " in line
    assert tree(finished) == before


def test_another_folder_can_start_from_its_checkpoint(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    before = tree(finished)
    branch = tmp_path / "branch"
    changes = [f"resume={finished}", "training.max_steps=44", "optimizer.learning_rate=0.001"]
    assert run_here(tiny_run(text, branch, *changes)) == 0
    assert list(by_step(branch, "loss")) == [41, 42, 43, 44]
    assert by_step(branch, "loss")[41] < by_step(finished, "loss")[1] - 1
    assert tree(branch / "tokenizer") == tree(finished / "tokenizer")
    assert tree(finished) == before


def test_a_truncated_checkpoint_is_refused(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    for name, content in tree(finished / "checkpoints" / "step_00000040").items():
        (damaged / name).parent.mkdir(parents=True, exist_ok=True)
        (damaged / name).write_bytes(content[: len(content) // 2] if name == WEIGHTS else content)
    assert run_here(tiny_run(text, tmp_path / "run", f"resume={damaged}")) == 2
    line = one_line(capsys)
    assert f"resume='{damaged}'" in line
    assert f"the checkpoint is damaged: {damaged / WEIGHTS} has" in line
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_has_its_own_exit_code(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [
        "optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "training.max_bad_steps=2",
    ]  # fmt: skip
    assert run_here(tiny_run(text, tmp_path / "run", *changes)) == 3
    err = capsys.readouterr().err
    assert "skipped: loss" in err
    assert "2 steps in a row without a finite loss and gradient" in err
    assert "Lower optimizer.learning_rate" in err
    assert "Traceback" not in err


def wandb_records(path: Path) -> list[Any]:
    """Read a wandb transaction log: a header, then LevelDB records in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, parts, position = [], b"", 7
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def test_wandb_offline_keeps_the_figures_without_a_network(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = ["tracking=wandb", "training.max_steps=6", "training.eval_every=3"]
    folders = {name: str(tmp_path / name.lower()) for name in ("WANDB_CACHE_DIR",
               "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}  # fmt: skip
    finish(start(tiny_run(text, run, *changes), WANDB_MODE="offline", **folders))
    [log] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    records = wandb_records(log)
    logged: dict[int, dict[str, float]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            logged.setdefault(items["_step"], {}).update(items)
    for row in read_metrics(run / "metrics.jsonl"):
        for figure in ("loss", "grad_norm", "learning_rate", "val_loss", "val_bits_per_byte"):
            if figure in row:
                assert logged[row["step"]][figure] == row[figure], (row["step"], figure)
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
    assert "val_loss" in logged[3]
    kinds = {record.WhichOneof("record_type") for record in records}
    assert {"run", "exit"} <= kinds
    [config] = [r.run.config for r in records if r.WhichOneof("record_type") == "run"][:1]
    [model] = [item.value_json for item in config.update if item.key == "model"]
    assert json.loads(model)["d_model"] == 64
