"""A script as a scheduler's job: what a task does that a launcher of Hydra started.

``python train.py --multirun hydra/launcher=slurm`` composes here and runs elsewhere: submitit
starts the composed script once for each process, on the nodes that Slurm gives. A task finds its
place among the processes from submitit, and hands a stop ahead of the time limit back to it, which
requeues.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from mamba2lm.schema import ConfigError

log = logging.getLogger(__name__)

EXIT_REQUEUE = 76
"""Exit code after SIGUSR1, which schedulers send ahead of a time limit: saved; start it again."""


class Ended(Exception):
    """A job has ended with an exit code other than 0, as it meant to."""

    def __init__(self, code: int) -> None:
        """Keep the code for the process that launched the job."""
        super().__init__(code)
        self.code = code


def prepare_to_launch() -> None:
    """Have submitit ask for SIGUSR1 ahead of a time limit: the signal that training saves at."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")


def runs_as_job() -> bool:
    """Return whether a launcher that starts processes elsewhere has composed the configuration."""
    hydra = HydraConfig.get()
    here = hydra.launcher._target_ == "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    return hydra.mode == RunMode.MULTIRUN and not here


def run_job(main: Callable[[], int | None]) -> None:
    """Run a script as one process of a job.

    Args:
        main: Returns an exit code, the same on every process.

    Raises:
        ConfigError: What is to be mended, for the process that launched the job.
        Ended: With any other code than 0, for the same.
    """
    try:
        code = main()
    except ConfigError:
        raise
    except Exception:
        # Hydra would keep it for the launching process, and the other tasks would wait for this
        # one; a bad exit has Slurm end them.
        log.exception("process %s of the job failed", os.environ.get("RANK", "0"))
        sys.exit(1)
    if code == EXIT_REQUEUE and "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment

        # submitit's handler, back in place: it requeues from the first task, and ends that.
        signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
    if code:
        raise Ended(code)


def join_job() -> None:
    """Take this task's place among the processes of its job, as torchrun would give it one."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit  # here, where it has started this process

    job = submitit.JobEnvironment()
    if job.num_tasks > 1:
        place = submitit.helpers.TorchDistributedEnvironment()
        # All GPUs of a node stay visible to its tasks: the local rank says which is whose.
        place.export(set_cuda_visible_devices=False, overwrite=True)
