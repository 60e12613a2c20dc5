"""What befalls runs of several processes: killed, stopped, told to stop, started twice."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba2lm.models.checkpoint import checkpoints_of, newest_valid
from tests.distributed.launch import torchrun
from tests.training.helpers import ROOT, run_here, text_file, tiny_run

CHANGES = (
    "training.max_steps=100000", "training.eval_every=0", "training.save_every=2",
    "training.batch_size=4", "data.sequence_length=64", "parallel.tensor=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


class Launched:
    """A training command on two processes, and what it writes."""

    def __init__(self, text: Path, run: Path, *changes: str) -> None:
        self.run, self.log = run, run.with_suffix(".log")
        command = torchrun(2, "train.py", *tiny_run(text, run, *CHANGES, *changes))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def step(self) -> int:
        """Return the last step that this launch told of."""
        told = re.findall(r"step (\d+)/100000", self.log.read_text())
        return int(told[-1]) if told else 0

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something, or fail with the log."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Return the processes' ids, by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {}
        for pid in map(int, children.read_text().split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [v for v in environment if v.startswith(b"RANK=")]
            if rank:
                found[int(rank[0].partition(b"=")[2])] = pid
        return [found[rank] for rank in sorted(found)]

    def end(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def kill_and_look(text: Path, run: Path, seconds: float, rank: int) -> None:
    """Kill one process some time into a run; look at what is left."""
    before = checkpoints_of(run)[-1:] if run.exists() else []
    begin = int(before[0].name[-8:]) if before else 0
    launched = Launched(text, run)
    try:
        launched.wait_until(lambda: launched.step() > begin + 4)
        time.sleep(seconds)
        os.kill(launched.workers()[rank], signal.SIGKILL)
        launched.process.wait(timeout=60)
        reached = launched.step()
    finally:
        launched.end()
    found = newest_valid(run)
    assert found is not None, launched.log.read_text()
    # Saved every second step, while the next two are taken.
    assert int(found.name[-8:]) >= reached - 4
    assert int(found.name[-8:]) > begin


def test_a_killed_process_costs_the_steps_since_the_last_save(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_and_look(text, run, 0.05, rank=1)
    # It goes on, and all hear of a signal to one, whichever.
    for asked, code, rank in ((signal.SIGUSR1, 76, 1), (signal.SIGTERM, 75, 0)):
        signal_and_look(text, run, asked, code, rank)


def signal_and_look(text: Path, run: Path, asked: signal.Signals, code: int, rank: int) -> None:
    """Send a signal to one process of a run that goes on; look at how it ends and what is saved."""
    launched = Launched(text, run)
    try:
        begin = int(checkpoints_of(run)[-1].name[-8:])
        launched.wait_until(lambda: launched.step() > begin)
        assert asked.name not in launched.log.read_text()
        os.kill(launched.workers()[rank], asked)
        launched.process.wait(timeout=60)
    finally:
        launched.end()
    log = launched.log.read_text()
    assert f"stopped by {asked.name}" in log
    assert log.count(f"exitcode  : {code}") + log.count(f"(exitcode: {code})") >= 1, log
    newest = newest_valid(run)
    assert newest is not None
    assert int(newest.name[-8:]) == launched.step()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(text: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(20):
        kill_and_look(text, tmp_path / "run", moments.uniform(0.0, 0.4), moments.randrange(2))


def test_a_stopped_process_is_named_and_a_second_run_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    launched = Launched(text, run, "parallel.timeout=8")
    try:
        launched.wait_until(lambda: launched.step() > 2)
        assert run_here(tiny_run(text, run, *CHANGES[:-1])) == 2
        assert "is training in it" in capsys.readouterr().err
        stopped = launched.workers()[1]
        os.kill(stopped, signal.SIGSTOP)
        launched.wait_until(lambda: "no progress for" in launched.log.read_text(), seconds=60)
        os.kill(stopped, signal.SIGKILL)  # the launcher would, in half a minute
        launched.process.wait(timeout=60)
    finally:
        launched.end()
    assert "process 1 has not answered" in launched.log.read_text()
    assert launched.process.returncode != 0
