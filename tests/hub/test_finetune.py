"""Training that begins with weights from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mamba2lm.hub.export import ExportConfig, export
from mamba2lm.inference import load_run
from mamba2lm.models.checkpoint import WEIGHTS, checkpoints_of
from mamba2lm.training.metrics import read_metrics
from tests.hub.models import real_ids, tokenizer
from tests.hub.test_load import foreign
from tests.training.helpers import run_here, text_file


def arguments(source: Path, run: Path, text: Path, *changes: str) -> list[str]:
    """Return the arguments of a few steps of fine-tuning."""
    values = {
        "init_from": str(source), "run_dir": str(run), "data.sources": f"[{text}]",
        "data.sequence_length": "48", "optimizer.learning_rate": "0.003",
        "optimizer.kind": "adamw", "schedule.kind": "constant", "schedule.warmup_steps": "0",
        "training.max_steps": "6", "training.batch_size": "4", "training.precision": "fp32",
        "training.threads": "1", "training.log_every": "1", "training.eval_every": "0",
        "training.save_every": "3", "training.sample_tokens": "0", "training.peak_tflops": "1",
    }  # fmt: skip
    values |= dict(change.split("=", 1) for change in changes)
    return ["~experiment", *(f"{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"), words=4000)


def test_fine_tuning_begins_with_their_weights_and_goes_back(tmp_path: Path, text: Path) -> None:
    theirs = foreign(tmp_path / "theirs", "granite")
    tokenizer().save(tmp_path / "theirs")
    run = tmp_path / "run"
    assert run_here(arguments(tmp_path / "theirs", run, text)) == 0

    config: Any = OmegaConf.load(run / "config.yaml")
    assert config.model.pattern == "MFAFMF"
    assert config.init_from == str(tmp_path / "theirs")
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.2
    trained = load_run(run)
    assert trained.tokenizer is not None
    assert trained.tokenizer.encode("It was") == tokenizer().encode("It was")
    # The first loss is that of their weights: nothing was made anew.
    untrained = arguments(tmp_path / "theirs", tmp_path / "one", text, "training.max_steps=1")
    assert run_here([*untrained, "optimizer.learning_rate=1e-30"]) == 0
    unchanged = load_run(tmp_path / "one").model
    with torch.no_grad():
        expected_blv = theirs(real_ids()).logits
        torch.testing.assert_close(unchanged(real_ids()).logits, expected_blv, rtol=0, atol=1e-4)
        assert (trained.model(real_ids()).logits - expected_blv).abs().max() > 0.1

    back = export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "back")))
    again: Any = AutoModelForCausalLM.from_pretrained(back)
    assert type(again) is type(theirs)
    card = (back / "README.md").read_text()
    assert "trained with mamba2lm" in card
    assert "training loss, nats per token" in card


def test_it_goes_on_bit_for_bit_without_what_it_began_with(tmp_path: Path, text: Path) -> None:
    foreign(tmp_path / "theirs", "mamba2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(arguments(tmp_path / "theirs", whole, text)) == 0
    assert run_here(arguments(tmp_path / "theirs", parts, text)) == 0
    for late in checkpoints_of(parts)[1:]:
        shutil.rmtree(late)  # as if it had stopped after step 3
    shutil.rmtree(tmp_path / "theirs")
    assert run_here(arguments(tmp_path / "theirs", parts, text)) == 0
    ends = [checkpoints_of(run)[-1] for run in (whole, parts)]
    assert [end.name for end in ends] == ["step_00000006"] * 2
    assert (ends[0] / WEIGHTS).read_bytes() == (ends[1] / WEIGHTS).read_bytes()


def test_a_run_of_ours_is_a_beginning_too(tmp_path: Path, text: Path) -> None:
    foreign(tmp_path / "theirs", "mamba")
    assert run_here(arguments(tmp_path / "theirs", tmp_path / "first", text)) == 0
    changes = ("training.max_steps=1", "optimizer.learning_rate=1e-30")
    second = arguments(tmp_path / "first", tmp_path / "second", text, *changes)
    assert run_here(second) == 0
    weights = [
        load_file(checkpoints_of(tmp_path / name)[-1] / WEIGHTS) for name in ("first", "second")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-12)


def test_a_source_that_is_none_is_named(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(arguments(tmp_path / "nowhere", tmp_path / "run", text)) == 2
    assert "error: init_from=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_lora_learns_goes_on_and_is_merged_on_the_way_out(
    kind: str, tmp_path: Path, text: Path
) -> None:
    theirs = foreign(tmp_path / "theirs", "granite")
    tokenizer().save(tmp_path / "theirs")
    changes = ("lora.rank=4", "optimizer.learning_rate=0.02", "training.max_steps=8",
               "training.save_every=4", f"optimizer.kind={kind}")  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(arguments(tmp_path / "theirs", whole, text, *changes)) == 0
    losses = [row["loss"] for row in read_metrics(whole / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    end = checkpoints_of(whole)[-1]
    weights = load_file(end / WEIGHTS)
    before = load_run(tmp_path / "theirs").model.state_dict()
    for name, tensor in weights.items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name]), name
    moments = load_file(end / "optimizer.safetensors")
    assert all("lora_" in name for name in moments)

    assert run_here(arguments(tmp_path / "theirs", parts, text, *changes)) == 0
    shutil.rmtree(checkpoints_of(parts)[-1])
    assert run_here(arguments(tmp_path / "theirs", parts, text, *changes)) == 0
    assert (checkpoints_of(parts)[-1] / WEIGHTS).read_bytes() == (end / WEIGHTS).read_bytes()

    # Everything that loads a run gets plain merged weights, and so does an export.
    trained = load_run(whole)
    assert trained.model.state_dict().keys() == before.keys()
    back = export(ExportConfig(checkpoint=str(whole), output=str(tmp_path / "back")))
    again: Any = AutoModelForCausalLM.from_pretrained(back)
    assert type(again) is type(theirs)
    with torch.no_grad():
        logits_blv = again(real_ids()).logits
        torch.testing.assert_close(trained.model(real_ids()).logits, logits_blv, rtol=0, atol=1e-4)
        assert (logits_blv - theirs(real_ids()).logits).abs().max() > 0.05


def test_lora_needs_a_model_to_change(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, tmp_path / "run", text, "lora.rank=4")
    assert run_here([argument for argument in given if "init_from" not in argument]) == 2
    assert "error: lora.rank=4: changes a trained model" in capsys.readouterr().err
