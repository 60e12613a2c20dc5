"""A run whose process stops answering ends, and says which process it was.

When one process is stopped or lost, the others wait for it in a collective, for ever on a GPU. Here
a thread of every process notes in the store that started the run that it is alive and how far its
training has come. Who sees no progress for too long reads everybody's notes. While any process gets
on, say with writing a large file, it waits; else it names the processes that gave no sign of life
(or, when all did, those that are furthest behind) and ends itself; the launcher then ends the rest.

A launcher that sees one process die sends the others SIGTERM, which asks for a stop at the end of a
step; but the step in which a process was lost does not end. So who has been told to stop, or has
lost its launcher, waits for a silent process for seconds only. A step that takes long while every
process answers is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)

EXIT_UNANSWERED = 5
"""Exit code of a process that waited too long for another."""
INTERVAL = 1.0
"""Seconds between a process's notes, at most."""
SILENCE = 10.0
"""Seconds without a sign of life of another process, for one that has been told to stop. Less than
the half minute that torchrun gives the others."""
UNWATCHED = 60.0
"""The same without progress of its own, for one that nobody can be asked about any more."""


class Store(Protocol):
    """What processes leave notes in."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass
class _Note:
    """What another process said last, and when this one first read it."""

    alive: int
    steps: int
    heard: float
    moved: float
    finished: bool = False


class Watchdog:
    """Watch over the progress of a run of several processes."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        timeout: float,
        told_to_stop: Callable[[], bool] = lambda: False,
        give_up: Callable[[], None] = lambda: os._exit(EXIT_UNANSWERED),
    ) -> None:
        """Start the thread.

        Args:
            store: Shared by the processes of the run; used by this thread alone.
            rank: This process.
            size: How many processes there are.
            timeout: Seconds without progress after which to give up.
            told_to_stop: Whether this process was asked to stop; the thread calls it, for the main
                thread may wait in a collective.
            give_up: Ends this process; a thread cannot interrupt a collective in any other way.
        """
        self._store, self._rank, self._size = store, rank, size
        self._timeout, self._give_up = timeout, give_up
        self._told_to_stop = told_to_stop
        self._launcher = os.getppid()
        self._steps = 0
        self._changed = time.monotonic()
        self._closed = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Note that training goes on; called at every step and while something takes long."""
        self._steps += 1
        self._changed = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """End the thread.

        Args:
            finished: Whether all went well, so that the others need not miss this process.
        """
        self._finished = finished
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(self._timeout / 10, INTERVAL)
        notes: dict[int, _Note] = {}
        number, stopping = 0, ""
        while not self._closed.wait(interval):
            told, orphaned = self._told_to_stop(), os.getppid() != self._launcher
            stopping = stopping or (
                "told to stop" if told else "the launcher ended" if orphaned else ""
            )
            now = time.monotonic()
            waited = now - self._changed
            try:
                number += 1
                self._say(number)
                if waited < self._timeout / 2 and not stopping:
                    continue
                self._read(notes, now)
            except (dist.DistError, RuntimeError) as error:
                if waited < (min(self._timeout, UNWATCHED) if stopping else self._timeout):
                    continue
                message = "the process that keeps the run's store does not answer"
                log.error("no progress for %.0f s: %s (%s)", waited, message, error)
                self._give_up()
                return
            silent = self._silent(notes, now, SILENCE)
            if stopping and silent:
                log.error(
                    "%s, and %s not answered for %.0f s: ending without saving",
                    stopping, _named(silent), SILENCE,
                )  # fmt: skip
                self._give_up()
                return
            if now - max(note.moved for note in notes.values()) >= self._timeout:
                log.error("no progress for %.0f s: %s", waited, self._blame(notes, now))
                self._give_up()
                return
        if self._finished:
            # The store may have gone with a process that finished before.
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._say(number + 1)

    def _say(self, number: int) -> None:
        """Leave this process's note."""
        note = f"{number} {self._steps} {int(self._finished)}"
        self._store.set(f"alive/{self._rank}", note)

    def _read(self, notes: dict[int, _Note], now: float) -> None:
        """Bring what is known of every process up to date."""
        keys = {rank: f"alive/{rank}" for rank in range(self._size)}
        if not self._store.check(
            [*keys.values()]
        ):  # one was lost before its first note, or is late
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        told = dict(zip(keys, self._store.multi_get([*keys.values()]), strict=True))
        for rank in range(self._size):
            alive, steps, finished = map(int, told.get(rank, b"0 0 0").split())
            note = notes.setdefault(rank, _Note(alive, steps, now, self._changed))
            if note.alive != alive:
                note.alive, note.heard = alive, now
            if note.steps != steps:
                note.steps, note.moved = steps, now
            note.finished = bool(finished)

    def _silent(self, notes: dict[int, _Note], now: float, seconds: float) -> list[int]:
        """List the processes that gave no sign of life for so long."""
        return [
            rank
            for rank, note in notes.items()
            if rank != self._rank and not note.finished and now - note.heard > seconds
        ]

    def _blame(self, notes: dict[int, _Note], now: float) -> str:
        if silent := self._silent(notes, now, self._timeout / 4):
            return f"{_named(silent)} not answered for a while"
        least = min(note.steps for note in notes.values())
        behind = [rank for rank, note in notes.items() if note.steps == least]
        if len(behind) == self._size:
            return "every process answers, and all wait for each other"
        return f"{_named(behind)} fallen behind"


def _named(ranks: list[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"process {numbers} has" if len(ranks) == 1 else f"processes {numbers} have"


def store_of_run(timeout: float) -> Store:
    """Connect to the store by which torchrun or accelerate started the processes."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=max(min(timeout / 2, 30.0), 1.0)),
    )
    # A launcher may start processes again; their notes are not those of an earlier start.
    return PrefixStore(f"mamba2lm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
