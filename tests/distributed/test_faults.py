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

from mamba2lm.distributed.watchdog import EXIT_UNANSWERED
from mamba2lm.models.checkpoint import checkpoints_of, newest_valid
from tests.distributed.launch import torchrun
from tests.processes import ROOT, Program
from tests.training.helpers import run_here, text_file, tiny_run

CHANGES = (
    "training.max_steps=100000", "training.eval_every=0", "training.save_every=2",
    "training.batch_size=4", "data.sequence_length=64", "parallel.tensor=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


class Launched:
    """A training command on two processes that torchrun starts, and what it writes."""

    def __init__(self, text: Path, run: Path) -> None:
        self.log = run.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                torchrun(2, *command(text, run)),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def written(self) -> bytes:
        """Return what the processes wrote until now."""
        return self.log.read_bytes()

    @property
    def pids(self) -> list[int]:
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


def command(text: Path, run: Path, *changes: str) -> list[str]:
    return ["train.py", *tiny_run(text, run, *CHANGES, *changes)]


def step_of(program: Launched | Program) -> int:
    """Return the last step that a run told of."""
    told = re.findall(rb"step (\d+)/100000", program.written())
    return int(told[-1]) if told else 0


def wait_until(
    happened: Callable[[], bool], program: Launched | Program, seconds: float = 240
) -> None:
    """Wait for something, or fail with what was written."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, program.written().decode()
        time.sleep(0.02)


def kill_and_look(text: Path, run: Path, seconds: float, rank: int, *, warm: bool) -> None:
    """Kill one process some time into a run; look at what is left."""
    before = checkpoints_of(run)[-1:] if run.exists() else []
    begin = int(before[0].name[-8:]) if before else 0
    launched = Program(*command(text, run), processes=2) if warm else Launched(text, run)
    try:
        wait_until(lambda: step_of(launched) > begin + 4, launched)
        time.sleep(seconds)
        os.kill(launched.pids[rank], signal.SIGKILL)
        if isinstance(launched, Launched):
            assert launched.process.wait(timeout=120) != 0  # torchrun ends the other
        reached = step_of(launched)
    finally:
        launched.end()
    found = newest_valid(run)
    assert found is not None, launched.written().decode()
    # Saved every second step, while the next two are taken.
    assert int(found.name[-8:]) >= reached - 4
    assert int(found.name[-8:]) > begin


def test_a_killed_process_costs_the_steps_since_the_last_save(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_and_look(text, run, 0.05, rank=1, warm=False)
    # It goes on, and all hear of a signal to one, whichever.
    for asked, code, rank in ((signal.SIGUSR1, 76, 1), (signal.SIGTERM, 75, 0)):
        signal_and_look(text, run, asked, code, rank)


def signal_and_look(text: Path, run: Path, asked: signal.Signals, code: int, rank: int) -> None:
    """Send a signal to one process of a run that goes on; look at how it ends and what is saved."""
    begin = int(checkpoints_of(run)[-1].name[-8:])
    program = Program(*command(text, run), processes=2)
    try:
        wait_until(lambda: step_of(program) > begin, program)
        assert asked.name.encode() not in program.written()
        os.kill(program.pids[rank], asked)
        log = program.wait(timeout=120).stderr.decode()
    finally:
        program.end()
    assert program.codes == [code, code], log
    told = re.findall(rf"stopped by {asked.name} at step (\d+)", log)
    assert len(told) == 1, log
    newest = newest_valid(run)
    assert newest is not None
    assert int(newest.name[-8:]) == int(told[0]) > begin


@pytest.mark.slow
def test_twenty_kills_at_random_moments(text: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(20):
        seconds, rank = moments.uniform(0.0, 0.4), moments.randrange(2)
        kill_and_look(text, tmp_path / "run", seconds, rank, warm=True)


def test_a_stopped_process_is_named_and_a_second_run_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    program = Program(*command(text, run, "parallel.timeout=8"), processes=2)
    try:
        wait_until(lambda: step_of(program) > 2, program)
        assert run_here(tiny_run(text, run, *CHANGES[:-1])) == 2
        assert "is training in it" in capsys.readouterr().err
        os.kill(program.pids[1], signal.SIGSTOP)
        wait_until(lambda: program.codes[0] is not None, program)
        log = program.written().decode()
    finally:
        program.end()
    assert program.codes == [EXIT_UNANSWERED, -signal.SIGKILL], log
    assert "no progress for" in log
    assert "process 1 has not answered" in log


def test_told_to_stop_no_process_waits_for_one_that_hangs(text: Path, tmp_path: Path) -> None:
    # What a launcher does when a process dies, which over NCCL leaves the others in a collective;
    # gloo would notice the death, so the other process is stopped.
    run = tmp_path / "run"
    program = Program(*command(text, run), processes=2)
    try:
        wait_until(lambda: bool(checkpoints_of(run)), program)
        os.kill(program.pids[1], signal.SIGSTOP)
        told = time.monotonic()
        os.kill(program.pids[0], signal.SIGTERM)
        wait_until(lambda: program.codes[0] is not None, program)
        assert time.monotonic() - told < 200, "not parallel.timeout"
        log = program.written().decode()
    finally:
        program.end()
    assert program.codes == [EXIT_UNANSWERED, -signal.SIGKILL], log
    assert "told to stop, and process 1 has not answered for 10 s" in log
    assert newest_valid(run) is not None
