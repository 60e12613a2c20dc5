"""What goes wrong beside the mathematics: spikes, a full disk, signals, two runs in one folder."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba2lm.models.checkpoint import checkpoints_of, newest_valid, pointed
from mamba2lm.schema import ConfigError
from mamba2lm.training import faults
from mamba2lm.training.checkpoint import SaveError
from mamba2lm.training.run_folder import open_run
from tests.distributed.full_disk import simulated
from tests.training.helpers import Rows, make_trainer, text_corpus


def test_a_loss_spike_is_skipped_and_its_samples_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "SPIKE_WINDOW", 4)
    trainer = make_trainer(
        tmp_path / "run", text_corpus(tmp_path), max_steps=9, spike_sigmas=6.0, save_every=3
    )
    calls = 0

    def jump(module: object, given: object, result: Any) -> Any:
        nonlocal calls
        calls += 1
        return result._replace(loss=result.loss * 10) if calls == 7 else result

    trainer.model.register_forward_hook(jump)
    with caplog.at_level(logging.WARNING):
        assert trainer.fit()
    warnings = [r.getMessage() for r in caplog.records if "skipped: loss" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("step 7 skipped: loss ")
    assert warnings[0].endswith("samples 24 to 27")
    assert len(trainer.progress.recent_losses) == 4
    # What a spike is compared with is saved too: going on changes nothing.
    again = make_trainer(
        tmp_path / "again", text_corpus(tmp_path), max_steps=9, spike_sigmas=6.0,
        resume=str(tmp_path / "run" / "checkpoints" / "step_00000009"),
    )  # fmt: skip
    assert again.progress.recent_losses == trainer.progress.recent_losses


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    limits: list[Any] = []

    def at(step: int) -> None:
        if step == 4:  # the save of step 4 comes after its row
            limits.append(simulated(room=16_384))
            limits[0].__enter__()
        if step == 6:  # before the save of step 6
            limits[0].__exit__(None, None, None)

    trainer = make_trainer(
        run, text_corpus(tmp_path), max_steps=8, save_every=2, keep_last=9, tracker=Rows(at)
    )
    with caplog.at_level(logging.ERROR):
        assert trainer.fit()
    assert [path.name[-1] for path in checkpoints_of(run)] == ["2", "6", "8"]
    assert "step_00000004.partial could not be written" in caplog.text
    assert "File too large" in caplog.text
    assert "training goes on" in caplog.text
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, text_corpus(tmp_path), max_steps=4, save_every=2)
    before = trainer.checkpoints.save

    def save(progress: Any, **given: Any) -> None:
        if progress.step == 4:
            with simulated(room=16_384):
                before(progress, **given)
                trainer.checkpoints.finish()
        else:
            before(progress, **given)

    trainer.checkpoints.save = save  # type: ignore[method-assign]
    with pytest.raises(SaveError, match="step_00000004"):
        trainer.fit()
    assert pointed(run, "latest") == newest_valid(run) == run / "checkpoints" / "step_00000002"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_for_the_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    def send(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    trainer = make_trainer(tmp_path / "run", text_corpus(tmp_path), tracker=Rows(send))
    assert trainer.fit() is False
    assert trainer.stop_signal == number
    assert checkpoints_of(tmp_path / "run")[-1].name == "step_00000003"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_thread_hears_of_a_signal_while_the_main_thread_waits() -> None:
    stops = faults.StopRequests()
    heard: list[tuple[bool, list[float]]] = []

    def listen() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        heard.append((stops.arrived(), stops.flags()))

    with stops.handled():
        assert not stops.arrived()
        thread = threading.Timer(0.1, listen)
        thread.start()
        # Outside the interpreter, as in a collective: no handler runs meanwhile.
        ctypes.CDLL(None).usleep(600_000)
        assert heard == [(True, [0.0, 0.0])]
        thread.join()
        assert stops.flags() == [0.0, 1.0]
    assert signal.set_wakeup_fd(-1) == -1


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    run = tmp_path / "run"
    steps_before_release: list[int] = []

    def at(step: int) -> None:
        if step == 6:
            steps_before_release.extend(int(p.name[-8:]) for p in checkpoints_of(run))
            released.set()

    trainer = make_trainer(run, text_corpus(tmp_path), max_steps=9, save_every=4, tracker=Rows(at))
    write = trainer.checkpoints._write

    def slow(*arguments: Any) -> None:
        assert released.wait(60)
        write(*arguments)

    monkeypatch.setattr(trainer.checkpoints, "_write", slow)
    assert trainer.fit()
    assert steps_before_release == []  # two steps after the save of step 4, which waits
    assert [path.name[-1] for path in checkpoints_of(run)] == ["8", "9"]


def test_what_a_save_writes_is_what_was_when_it_began(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, text_corpus(tmp_path), max_steps=1)
    trainer.fit()
    trainer.progress.step = 2
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.checkpoints.save(trainer.progress)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer.checkpoints.finish()
    other = make_trainer(tmp_path / "other", text_corpus(tmp_path), resume=str(run))
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    run, twin = open_run(str(tmp_path / "run"), "auto"), open_run(str(tmp_path / "run"), "auto")
    with run.locked():
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is training in it"):
            twin.locked().__enter__()
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists(), "nothing came of it"
    with twin.locked():
        pass
    # A lock that a killed process left holds nobody back.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1 on a machine")
    with open_run(str(tmp_path / "run"), "auto").locked():
        pass
