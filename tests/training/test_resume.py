"""A run that stopped and went on is the run that never stopped, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mamba2lm.models.checkpoint import WEIGHTS, checkpoints_of, pointed
from mamba2lm.schema import ConfigError
from mamba2lm.training.checkpoint import OPTIMIZER
from mamba2lm.training.metrics import read_metrics
from mamba2lm.training.optimizer import OptimizerConfig, OptimizerKind
from mamba2lm.training.trainer import Trainer
from tests.training.helpers import Rows, make_trainer, text_corpus, tiny_model


def sigterm_at(step: int) -> Rows:
    """Return a tracker that has SIGTERM sent after a step: the next step is the last."""

    def send(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Rows(send)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name in (WEIGHTS, OPTIMIZER, "random.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert len(load_file(ours / OPTIMIZER)) > 10


def curve(run: Path) -> list[tuple[Any, ...]]:
    kept = ("step", "tokens", "loss", "grad_norm", "learning_rate", "val_loss")
    return [tuple(row.get(k) for k in kept) for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("kind", "num_workers", "pattern"),
    [
        (OptimizerKind.adamw, 0, "MSAF"),
        (OptimizerKind.muon, 0, "M"),
        (OptimizerKind.adamw, 2, "M"),
    ],
)
def test_six_and_six_steps_are_twelve(
    tmp_path: Path, kind: OptimizerKind, num_workers: int, pattern: str
) -> None:
    corpus = text_corpus(tmp_path)

    def build(run: str, seed: int, tracker: Rows | None = None) -> Trainer:
        return make_trainer(
            tmp_path / run,
            corpus,
            tiny_model(pattern, seed=seed),
            optimizer=OptimizerConfig(kind, learning_rate=3e-3),
            num_workers=num_workers,
            tracker=tracker,
            eval_every=4,
            eval_batches=2,
            micro_batch_size=2,
        )

    assert build("whole", 0).fit()
    assert build("parts", 0, sigterm_at(5)).fit() is False
    assert checkpoints_of(tmp_path / "parts")[-1] == step_folder(tmp_path / "parts", 6)
    second = build("parts", 1)  # other initial weights: everything has to come from the checkpoint
    assert second.progress.step == 6
    assert second.fit()
    assert_same_checkpoint(step_folder(tmp_path / "whole", 12), step_folder(tmp_path / "parts", 12))
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert [row[0] for row in curve(tmp_path / "parts") if row[2] is not None] == [*range(1, 13)]


def test_sigterm_in_the_last_step_completes_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", text_corpus(tmp_path), max_steps=4, tracker=sigterm_at(3)
    )
    assert trainer.fit()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_kill_left_half_written_is_harmless(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    make_trainer(tmp_path / "whole", corpus, max_steps=9).fit()
    run = tmp_path / "killed"
    make_trainer(
        run, corpus, max_steps=9, tracker=sigterm_at(2), write_sample=lambda model: "text",
        sample_every=1,
    ).fit()  # fmt: skip
    # As SIGKILL leaves them: a checkpoint half written, one half deleted, a metrics line cut
    # short, and rows and samples of steps that no checkpoint has.
    partial = step_folder(run, 9).with_suffix(".partial")
    shutil.copytree(step_folder(run, 3), partial)
    (partial / WEIGHTS).write_bytes(b"cut short")
    (partial / "left over").write_text("of another attempt")
    doomed = step_folder(run, 2).with_suffix(".deleting")
    shutil.copytree(step_folder(run, 3), doomed)
    (doomed / WEIGHTS).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tokens": 512, "loss": 123.0}\n{"step": 5, "tok')
    with (run / "samples.txt").open("a") as file:
        file.write("=== step 4\nof a step that is done again\n\n")

    resumed = make_trainer(
        run, corpus, max_steps=9, save_every=3, keep_last=1, write_sample=lambda model: "again",
        sample_every=4,
    )  # fmt: skip
    assert resumed.progress.step == 3
    assert resumed.fit()
    assert_same_checkpoint(step_folder(tmp_path / "whole", 9), step_folder(run, 9))
    assert not (step_folder(run, 9) / "left over").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000009"]
    assert [row[0] for row in curve(run)] == [*range(1, 10)]
    assert curve(run)[3:] == curve(tmp_path / "whole")[3:]
    assert (run / "samples.txt").read_text() == "".join(
        f"=== step {step}\n{text}\n\n"
        for step, text in [(1, "text"), (2, "text"), (3, "text"), (4, "again"), (8, "again"),
                           (9, "again")]
    )  # fmt: skip


def test_a_damaged_newest_checkpoint_is_passed_over_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = text_corpus(tmp_path)
    run = tmp_path / "run"
    make_trainer(run, corpus, max_steps=6, save_every=3).fit()
    good = (step_folder(run, 6) / WEIGHTS).read_bytes()
    (step_folder(run, 6) / WEIGHTS).write_bytes(good[: len(good) // 2])
    resumed = make_trainer(run, corpus, max_steps=6, save_every=3)
    assert resumed.progress.step == 3
    assert any("damaged checkpoint" in r.getMessage() for r in caplog.records)
    assert resumed.fit()
    assert (step_folder(run, 6) / WEIGHTS).read_bytes() == good
    assert make_trainer(run, corpus, max_steps=6).complete


def test_a_run_can_start_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    first = tmp_path / "first"
    make_trainer(first, corpus, save_every=6, eval_every=6, eval_batches=1).fit()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    branch = make_trainer(
        tmp_path / "branch", corpus, resume=str(step_folder(first, 6)), eval_every=6, eval_batches=1
    )
    assert branch.progress.step == 6
    assert branch.fit()
    assert_same_checkpoint(step_folder(first, 12), step_folder(tmp_path / "branch", 12))
    assert [row[0] for row in curve(tmp_path / "branch")] == [7, 8, 9, 10, 11, 12, 12]
    assert pointed(tmp_path / "branch", "best") == step_folder(tmp_path / "branch", 12)
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}


def test_a_longer_run_goes_on_where_a_complete_one_ended(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run = tmp_path / "run"
    make_trainer(run, corpus, max_steps=3).fit()
    longer = make_trainer(run, corpus, max_steps=5)
    assert not longer.complete
    assert longer.fit()
    assert longer.progress.step == 5
    assert longer.progress.samples == 20
    assert longer.progress.tokens == 20 * 32
    assert longer.progress.seconds > 0


def test_other_data_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path / "run", text_corpus(tmp_path), max_steps=2).fit()
    other = text_corpus(tmp_path, sequence_length=48)
    assert make_trainer(tmp_path / "run", other, max_steps=4).fit()
    assert any("training data are not those" in r.getMessage() for r in caplog.records)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    make_trainer(tmp_path / "run", corpus, max_steps=2).fit()
    with pytest.raises(ConfigError, match=r"resume=.*do not fit the model.*missing layers.2"):
        make_trainer(tmp_path / "run", corpus, tiny_model("MM"), max_steps=4)
