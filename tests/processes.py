"""Start programs of this repository as real processes, without waiting for imports each time.

One server process for each test process imports torch and the package once, and is forked for every
program that is started: with its own arguments, environment, working folder, standard streams and
exit code, alone or as one of several ranks, as torchrun starts them. What torchrun itself does
(ending the rest, passing on signals) is tested with torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WARM = ["torch._dynamo", "train", "generate", "eval.tasks", "torch.distributed.fsdp"]
"""What programs import anyway: a training run's optimizer brings torch's compiler."""


class Program:
    """A program of the repository that runs, alone or as several ranks."""

    def __init__(
        self,
        *arguments: str,
        processes: int | None = None,
        stdin: bytes = b"",
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: As after ``python``: a script, ``-m`` and a module, or ``-c`` and code.
            processes: Ranks to start; None starts one that has not heard of ranks.
            stdin: What it reads, on every rank.
            cwd: Working folder, by default the repository.
            environment: Added to this process's.
        """
        self.arguments = arguments
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        ranks: list[dict[str, str]] = [{}]
        if processes is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ""
            shared = {
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            }  # fmt: skip
            ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "stdin").write_bytes(stdin)
        self._streams = [folder / str(rank) for rank in range(len(ranks))]
        self._children = [
            _server().Process(
                target=_run, args=(arguments, {**variables, **rank}, str(cwd or ROOT), str(stream))
            )
            for rank, stream in zip(ranks, self._streams, strict=True)
        ]
        for child in self._children:
            child.start()

    @property
    def pids(self) -> list[int]:
        """Return the processes' ids, by rank."""
        return [child.pid or 0 for child in self._children]

    @property
    def codes(self) -> list[int | None]:
        """Return the exit codes, by rank: negative after a signal, None while it runs."""
        return [child.exitcode for child in self._children]

    def written(self, suffix: str = ".err") -> bytes:
        """Return what the ranks wrote until now, one after the other."""
        files = [stream.with_suffix(suffix) for stream in self._streams]
        return b"".join(file.read_bytes() for file in files if file.exists())

    def end(self) -> None:
        """Kill what is left of it."""
        for child in self._children:
            child.kill()
            child.join()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[bytes]:
        """Wait for it, as torchrun does: when one process fails, the rest is killed after a while.

        Args:
            timeout: Seconds after which to fail.

        Returns:
            The first exit code that is not 0, and what the ranks wrote, one after the other.

        Raises:
            TimeoutExpired: With what had been written until then.
        """
        deadline, failed = time.monotonic() + timeout, None
        try:
            while None in self.codes:
                now = time.monotonic()
                if now > deadline:
                    written = self.written(".out"), self.written()
                    raise subprocess.TimeoutExpired(self.arguments, timeout, *written)
                if failed is None and any(self.codes):
                    failed = now
                if failed is not None and now > failed + 20:
                    break  # the rest waits for it in a collective
                time.sleep(0.02)
            # Who is ended because another failed is not the one that failed.
            code = next((c for c in self.codes if c and c > 0), None)
        finally:
            self.end()
        if code is None:
            code = next((c for c in self.codes if c), 0)
        done = subprocess.CompletedProcess(
            self.arguments, code, self.written(".out"), self.written()
        )
        self._folder.cleanup()
        return done


def run_program(
    *arguments: str,
    processes: int | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; for what is given and returned see ``Program``."""
    program = Program(
        *arguments, processes=processes, stdin=stdin, cwd=cwd, environment=environment
    )
    return program.wait(timeout)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


def _run(arguments: tuple[str, ...], environment: dict[str, str], cwd: str, streams: str) -> None:
    """Become the program, in a process that has just been forked."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, (name, flags) in enumerate(
        [
            (str(Path(streams).with_name("stdin")), os.O_RDONLY),
            (f"{streams}.out", os.O_WRONLY | os.O_CREAT),
            (f"{streams}.err", os.O_WRONLY | os.O_CREAT),
        ]
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    kind, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(str(ROOT / kind), run_name="__main__")
    finally:
        with contextlib.suppress(SystemExit):
            atexit._run_exitfuncs()  # a forked process would skip them
        sys.stdout.flush()


def free_port() -> int:
    """Return a TCP port that is free now.

    Below those that the system gives to whoever asks for any, which it could do in the meantime.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
