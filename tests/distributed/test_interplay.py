"""What processes that have parts of a model do with carried states, LoRA, evaluations, exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mamba2lm.hub.export import ExportConfig, export
from mamba2lm.inference import load_run
from mamba2lm.training.metrics import read_metrics
from tests.distributed.launch import run_on
from tests.processes import run_program
from tests.training.helpers import run_here, text_file, tiny_run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


def command(text: Path, run: Path, *changes: str) -> list[str]:
    settings = ("training.max_steps=4", "training.eval_every=0", "training.save_every=2")
    return tiny_run(text, run, *settings, "training.sample_tokens=0", *changes)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def refused(*arguments: str) -> str:
    done = run_program(*arguments, processes=2)
    assert done.returncode == 2
    return done.stderr.decode()


def test_states_are_carried_beside_shards_and_saved(text: Path, tmp_path: Path) -> None:
    carry = ("training.carry_state=true", "training.micro_batch_size=2")
    assert run_here(command(text, tmp_path / "one", *carry)) == 0
    shards = (*carry, "parallel.data_shard=2")
    run_on(2, "train.py", *command(text, tmp_path / "two", *shards))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    # Half of it again, from the states that were saved.
    half = f"resume={tmp_path / 'two/checkpoints/step_00000002'}"
    run_on(2, "train.py", *command(text, tmp_path / "again", *shards, half))
    assert losses(tmp_path / "again") == losses(tmp_path / "two")[2:]


@pytest.mark.parametrize(
    "layout", ["data_shard", pytest.param("data_replicate", marks=pytest.mark.slow)]
)
def test_lora_of_two_processes_is_that_of_one(text: Path, tmp_path: Path, layout: str) -> None:
    assert run_here(command(text, tmp_path / "base")) == 0
    lora = (f"init_from={tmp_path / 'base'}", "lora.rank=4", "optimizer.kind=adamw")
    assert run_here(command(text, tmp_path / "one", *lora)) == 0
    run_on(2, "train.py", *command(text, tmp_path / "two", *lora, f"parallel.{layout}=2"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    # What two saved half way, one goes on with.
    half = f"resume={tmp_path / 'two/checkpoints/step_00000002'}"
    assert run_here(command(text, tmp_path / "again", *lora, half)) == 0
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "one")[2:], rel=1e-4)


def test_lora_of_divided_matrices_is_refused(text: Path, tmp_path: Path) -> None:
    divided = command(
        text, tmp_path / "no", "init_from=anything", "lora.rank=4", "parallel.tensor=2"
    )
    message = refused("train.py", *divided)
    assert "error: lora.rank=4: trains whole matrices, which parallel.tensor divides" in message
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_in_parts_is_exported(text: Path, tmp_path: Path) -> None:
    run_on(2, "train.py", *command(text, tmp_path / "two", "parallel.data_shard=2"))
    two = load_run(tmp_path / "two").model
    export(ExportConfig(checkpoint=str(tmp_path / "two"), output=str(tmp_path / "out")))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_run(tmp_path / "out").model(ids).logits, two(ids).logits)


@pytest.mark.parametrize(
    "layout",
    [
        "data_shard",
        pytest.param("tensor", marks=pytest.mark.slow),
        pytest.param("context", marks=pytest.mark.slow),
    ],
)
def test_evaluations_at_validations(text: Path, tmp_path: Path, layout: str) -> None:
    more = (
        "training.eval_every=2",
        "+evaluation.tasks=[perplexity]",
        "+evaluation.perplexity.max_tokens=300",
    )
    figures = []
    if not (one := text.parent / "one").exists():
        assert run_here(command(text, one, *more)) == 0
    run_on(2, "train.py", *command(text, tmp_path / "two", *more, f"parallel.{layout}=2"))
    for run in (one, tmp_path / "two"):
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
        figures.append([v for row in rows for k, v in row.items() if k.startswith("perplexity")])
    assert len(figures[0]) >= 2
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


def test_states_in_parts_are_not_carried(text: Path, tmp_path: Path) -> None:
    carry = "training.carry_state=true"
    message = refused("train.py", *command(text, tmp_path / "no", carry, "parallel.tensor=2"))
    assert "error: training.carry_state=True: needs a whole state on one process" in message


@pytest.mark.slow
def test_two_processes_share_a_model_of_another_library(text: Path, tmp_path: Path) -> None:
    assert run_here(command(text, tmp_path / "run")) == 0
    export(ExportConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out")))
    arguments = [
        "generate.py", f"checkpoint={tmp_path / 'out'}", "prompt=The", "max_new_tokens=20",
        "sampling.temperature=0",
    ]  # fmt: skip
    alone, shared = (run_program(*arguments, processes=number) for number in (None, 2))
    assert alone.returncode == shared.returncode == 0
    assert len(alone.stdout) > 10
    assert shared.stdout == alone.stdout
