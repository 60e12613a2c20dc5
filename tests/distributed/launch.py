"""Start the same program on several gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.processes import ROOT, free_port, run_program


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Return the command that starts ``python <arguments>`` on so many processes."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--master-port", str(free_port()), *arguments,
    ]  # fmt: skip


def run_on(processes: int, *arguments: str, timeout: float = 300) -> str:
    """Run a program on so many processes; return what they wrote, or fail with it."""
    done = run_program(*arguments, processes=processes, timeout=timeout)
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    return told


def run_by_torchrun(processes: int, *arguments: str, timeout: float = 300) -> str:
    """Do the same with torchrun, from the environment that this process has."""
    done = subprocess.run(
        torchrun(processes, *arguments),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
