"""Runs of several layouts: saved by one, continued in others, by one process, made whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mamba2lm.models.__main__ import main as consolidate_command
from mamba2lm.models.checkpoint import (
    WEIGHTS,
    StoredTensors,
    load_model,
    newest_valid,
    verify,
)
from mamba2lm.training.metrics import read_metrics
from tests.distributed.launch import run_on
from tests.distributed.training import LAYOUTS, SETTINGS, saved
from tests.training.helpers import make_trainer, text_corpus, tiny_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs that four processes made in one launch."""
    folder = tmp_path_factory.mktemp("runs")
    run_on(4, "-m", "tests.distributed.training", str(folder))
    return folder


def losses(run: Path) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize(
    "what",
    [
        "same layout", "ended at step 5", "weights stay finite", "learned",
        "failure is everybody's", "earlier checkpoint stays", "waiting shows",
    ],
)  # fmt: skip
def test_on_four_processes(runs: Path, what: str) -> None:
    assert json.loads((runs / "results.json").read_text())[what]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on_with_the_same_samples_and_losses(runs: Path, layout: str) -> None:
    ours, whole = losses(runs / f"in {layout}"), losses(runs / "whole")
    assert list(ours) == [4, 5, 6]
    assert ours == pytest.approx({step: whole[step] for step in (4, 5, 6)}, abs=2e-5)
    ours_last, theirs = (
        json.loads((runs / run / "checkpoints/step_00000006/progress.json").read_text())
        for run in (f"in {layout}", "whole")
    )
    for name in ("step", "samples", "tokens", "data_fingerprint"):
        assert ours_last[name] == theirs[name]
    assert ours_last["best_val_loss"] == pytest.approx(theirs["best_val_loss"], abs=2e-5)


def test_one_process_goes_on_with_what_four_saved(runs: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "alone",
        text_corpus(runs),
        tiny_model("MSAF", seed=3),
        resume=saved(runs),
        **{**SETTINGS, "max_steps": 6},
    )
    assert trainer.fit()
    whole = losses(runs / "whole")
    assert losses(tmp_path / "alone") == pytest.approx({s: whole[s] for s in (4, 5, 6)}, abs=2e-5)


def test_the_command_makes_a_checkpoint_whole(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = newest_valid(runs / "whole")
    assert pieces is not None
    target = tmp_path / "whole"
    command = [str(runs / "whole"), str(target)]
    consolidate_command(command)
    verify(target)
    assert (target / WEIGHTS).is_file()
    assert not (target / "model").exists()
    for stem in ("model", "optimizer"):
        ours, theirs = StoredTensors(target, stem), StoredTensors(pieces, stem)
        assert ours.shapes == theirs.shapes
        for name in ours.shapes:
            assert torch.equal(ours.read(name), theirs.read(name)), name
    # Either is a model to run.
    ids = torch.arange(20)[None]
    logits = [load_model(folder)(ids).logits for folder in (target, pieces)]
    assert torch.equal(*logits)
    with pytest.raises(SystemExit, match="2"):
        consolidate_command(command)
    assert "error: target=" in capsys.readouterr().err


def test_rows_tell_the_slowest_process(runs: Path) -> None:
    rows = [row for row in read_metrics(runs / "in fsdp4" / "metrics.jsonl") if "loss" in row]
    for row in rows:
        assert 0 < row["step_seconds_min"] <= row["step_seconds_max"]
        assert row["slowest_process"] in range(4)
        assert 0 <= row["wait_fraction"] < 1
    assert [row["step"] for row in rows if "communication_fraction" in row] == [4, 6]
    assert all(0 < row.get("communication_fraction", 0.5) <= 1 for row in rows)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "pointer"])
def test_damage_to_one_process_file_falls_back_with_a_warning(
    runs: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    victim = run / "checkpoints/step_00000006/optimizer/00002.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-5])
    elif damage == "missing":
        victim.unlink()
    else:
        shutil.rmtree(run / "checkpoints/step_00000006")
        victim = run / "checkpoints/latest"
    found = newest_valid(run)
    assert found == run / "checkpoints/step_00000003"
    assert str(victim) in caplog.text
