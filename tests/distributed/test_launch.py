"""Two processes over gloo, started by torchrun and by accelerate, learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mamba2lm.models.checkpoint import WEIGHTS, checkpoints_of
from mamba2lm.training.metrics import read_metrics
from tests.processes import free_port
from tests.training.helpers import finish, run_here, start, text_file, tiny_run

CHANGES = ["training.max_steps=12", "training.eval_every=6", "model.pattern=MA",
           "model.mixers.A.n_heads=4"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"), words=20_000)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Return the folder of a run by one process, all 8 sequences of a step at once."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert run_here(tiny_run(text, run, *CHANGES)) == 0
    return run


def by_step(run: Path, figure: str) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row[figure] for row in rows if figure in row}


def assert_same_run(run: Path, alone: Path) -> None:
    for figure, steps in (("loss", range(1, 13)), ("grad_norm", range(1, 13)),
                          ("val_loss", (6, 12))):  # fmt: skip
        ours, theirs = by_step(run, figure), by_step(alone, figure)
        assert list(ours) == list(theirs) == list(steps)
        assert ours == pytest.approx(theirs, abs=1e-5), figure
    for figure in ("tokens", "learning_rate"):
        assert by_step(run, figure) == by_step(alone, figure)
    assert len(read_metrics(run / "metrics.jsonl")) == 14
    names = [[path.name for path in checkpoints_of(folder)] for folder in (run, alone)]
    assert names[0] == names[1]
    assert (run / "samples.txt").read_text().count("=== step") == 1
    ours, theirs = (load_file(checkpoints_of(folder)[-1] / WEIGHTS) for folder in (run, alone))
    for name, weight in theirs.items():
        # AdamW divides by the root of a gradient's square: where that is nearly nothing, the order
        # of a sum shows.
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4)


def test_torchrun_with_two_processes_gives_the_curve_of_one(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", str(free_port())]  # fmt: skip
    # Each process takes its 4 sequences one after the other two.
    arguments = tiny_run(text, tmp_path / "run", *CHANGES, "training.micro_batch_size=2")
    stderr = finish(start(arguments, launcher=launcher))
    assert stderr.count("parameters, pattern MA") == 1, "only the first process writes"
    assert stderr.count("step 12/12  loss") == 1
    assert_same_run(tmp_path / "run", alone)


def test_accelerate_launch_with_two_processes_gives_the_curve_of_one(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    # --multi_gpu is accelerate's word for several processes on this machine; without a GPU they
    # are CPU processes. With --cpu it would start one, and leave the rest to MPI.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", str(free_port())]  # fmt: skip
    arguments = tiny_run(text, tmp_path / "run", *CHANGES)
    stderr = finish(start(arguments, launcher=launcher, CUDA_VISIBLE_DEVICES=""))
    assert stderr.count("parameters, pattern MA") == 1
    assert_same_run(tmp_path / "run", alone)
