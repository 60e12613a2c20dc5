"""Scripts as jobs: submitit starts the processes, on this machine; what Slurm would be given."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest

from mamba2lm.jobs import Ended, join_job, run_job
from mamba2lm.schema import ConfigError
from mamba2lm.training.metrics import read_metrics
from tests.processes import Program, run_program
from tests.training.helpers import run_here, text_file, tiny_run

STEPS = 60
CHANGES = [f"training.max_steps={STEPS}", "training.eval_every=0", "training.sample_tokens=0",
           "data.sequence_length=64", "training.batch_size=4", "training.log_every=1"]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_a_job_of_two_processes_is_requeued_and_learns_what_one_process_learns(
    tmp_path: Path,
) -> None:
    text, run, jobs = text_file(tmp_path), tmp_path / "run", tmp_path / "jobs"
    program = Program(
        "train.py", "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={jobs}",
        "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=9", "parallel.tensor=2",
        *tiny_run(text, run, *CHANGES), environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while len(losses(run)) < 2:
            assert time.monotonic() < deadline, program.written().decode()
            time.sleep(0.01)
        # What a time limit that comes near does, to every process of a job.
        for task in tasks_of(jobs):
            os.kill(task, signal.SIGUSR1)
        done = program.wait(240)
    finally:
        program.end()
    logs = [file.read_text() for file in sorted(jobs.rglob("*_log.err"))]
    assert done.returncode == 0, (done.stderr, logs)
    assert len(logs) == 2
    assert logs[0].count("stopped by SIGUSR1 at step") == 1
    assert logs[0].count("continuing from") == 1
    assert f"step {STEPS}/{STEPS}  loss" in logs[0]
    assert "loss" not in logs[1], "only the first process writes"
    assert run_here(tiny_run(text, tmp_path / "alone", *CHANGES)) == 0
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert len(losses(run)) == STEPS


def tasks_of(jobs: Path) -> list[int]:
    """Return the ids of the processes that submitit started for the job of a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            ranked = any(word.startswith(b"SUBMITIT_LOCAL_GLOBALID=") for word in environment)
            if ranked and any(word.startswith(str(jobs).encode()) for word in words):
                found.append(int(process.name))
    assert len(found) == 2
    return found


@pytest.mark.slow
def test_a_mistake_that_shows_in_the_job_costs_a_line_and_its_codes_come_back(
    tmp_path: Path,
) -> None:
    text = text_file(tmp_path)
    for changes, code, told in (
        (["parallel.tensor=2"], 2, "error: parallel.tensor=2: "),
        (["optimizer.learning_rate=1e30", "training.max_grad_norm=1e30",
          "training.max_bad_steps=2"], 3, ""),
    ):  # fmt: skip
        done = run_program(
            "train.py", "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/jobs",
            *tiny_run(text, tmp_path / str(code), *CHANGES, *changes),
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert told in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()


def test_slurm_is_asked_for_a_process_a_gpu_and_a_signal_in_time(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text("#!/bin/sh\n")
    # Keeps what it is given, and takes nothing.
    (programs / "sbatch").write_text(f"#!/bin/sh\ncp $1 {tmp_path}/script\nexit 1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    done = run_program(
        "train.py", "-m", "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}/jobs",
        "hydra.launcher.nodes=4", "hydra.launcher.partition=big", f"run_dir={tmp_path}/run",
        environment={"PATH": f"{programs}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 1, "sbatch has failed"
    script = (tmp_path / "script").read_text()
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=big", "#SBATCH --signal=USR1@120", "#SBATCH --time=1440",
        "export SLURM_KILL_BAD_EXIT=1",
    ):  # fmt: skip
        assert line in script.splitlines(), script


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = run_program(
        "train.py", "-m", "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}/jobs",
        f"run_dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: hydra/launcher=slurm: there is no srun here")


def test_a_launcher_that_is_not_installed_is_named() -> None:
    program = (
        "import runpy, hydra_plugins\n"
        "hydra_plugins.__path__ = []  # where Hydra looks for them\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    done = run_program("-c", program, "-m", "hydra/launcher=slurm", "run_dir=nowhere")
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: hydra/launcher: 'submitit_slurm' is not installed")


def test_a_task_takes_its_place_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    join_job()
    assert "RANK" not in os.environ
    # As Slurm has it on the second of two nodes with four tasks each.
    given = {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "6", "SLURM_LOCALID": "2",
        "SLURM_JOB_NODELIST": "gpu[03-04]", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "RANK": "0",  # of whoever launched it
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in names[1:]:
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    join_job()
    place = {name: os.environ[name] for name in names}
    port = int(place.pop("MASTER_PORT"))
    assert place == {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4",
                     "MASTER_ADDR": "gpu03"}  # fmt: skip
    assert 1024 < port < 65536
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_how_a_job_ends(caplog: pytest.LogCaptureFixture) -> None:
    run_job(lambda: None)
    run_job(lambda: 0)
    with pytest.raises(Ended) as ended:
        run_job(lambda: 3)
    assert pickle.loads(pickle.dumps(ended.value)).code == 3
    mistake = ConfigError("parallel.tensor", 3, "does not divide.")

    def err(error: Exception) -> NoReturn:
        raise error

    with pytest.raises(ConfigError) as raised:
        run_job(lambda: err(mistake))
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (sent.key, sent.value, sent.remedy, str(sent)) == (
        "parallel.tensor", 3, "does not divide.", str(mistake),
    )  # fmt: skip
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as left:
        run_job(lambda: err(RuntimeError("no memory")))
    assert left.value.code == 1
    assert "process 0 of the job failed" in caplog.text


@pytest.mark.parametrize("given", ["slrm", "submitit_locl"])
def test_a_misspelt_launcher_gets_a_hint(given: str) -> None:
    done = run_program("train.py", "-m", f"hydra/launcher={given}", "run_dir=nowhere")
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"error: hydra/launcher='{given}': no such option. Did you mean")
