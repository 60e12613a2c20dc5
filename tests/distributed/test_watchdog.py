"""Whom a process still waits for, and for how long."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from mamba2lm.distributed import watchdog
from mamba2lm.distributed.watchdog import Watchdog


class Notes:
    """A store within this process; it may stop answering."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.answers = True

    def set(self, key: str, value: str) -> None:
        if not self.answers:
            raise RuntimeError("Broken pipe")
        self.notes[key] = value

    def check(self, keys: list[str]) -> bool:
        if not self.answers:
            raise RuntimeError("Broken pipe")
        return all(key in self.notes for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if not self.answers:
            raise RuntimeError("Broken pipe")
        return [self.notes[key].encode() for key in keys]


class Watched:
    """One process of two; the test leaves the other one's notes."""

    def __init__(self, timeout: float = 1e3) -> None:
        self.store, self.gave_up, self.told = Notes(), threading.Event(), False
        self.other("1 1 0")
        self.watchdog = Watchdog(
            self.store, rank=0, size=2, timeout=timeout,
            told_to_stop=lambda: self.told, give_up=self.gave_up.set,
        )  # fmt: skip

    def other(self, note: str) -> None:
        self.store.notes["alive/1"] = note

    def waits(self, seconds: float, *, other_lives: bool = True) -> bool:
        """Return whether it still waits after so long."""
        deadline, number = time.monotonic() + seconds, 1
        while time.monotonic() < deadline:
            if self.gave_up.wait(0.02):
                return False
            number += 1
            if other_lives:
                self.other(f"{number} 1 0")
        return True


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make seconds of waiting tenths of seconds."""
    monkeypatch.setattr(watchdog, "INTERVAL", 0.02)
    monkeypatch.setattr(watchdog, "SILENCE", 0.4)
    monkeypatch.setattr(watchdog, "UNWATCHED", 0.4)


def test_told_to_stop_it_does_not_wait_for_a_lost_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process = Watched()
    assert process.waits(0.6, other_lives=False), "nobody told it to stop"
    process.told = True
    assert not process.waits(20, other_lives=False)
    assert "told to stop, and process 1 has not answered for" in caplog.text
    process.watchdog.close(finished=False)


def test_a_process_lost_before_its_first_note_is_not_waited_for_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process = Watched()
    del process.store.notes["alive/1"]
    process.told = True
    assert not process.waits(20, other_lives=False)
    assert "process 1 has not answered for" in caplog.text
    process.watchdog.close(finished=False)


def test_told_to_stop_it_waits_for_a_step_that_takes_long() -> None:
    process = Watched()
    process.told = True
    assert process.waits(1.2)
    process.watchdog.close(finished=True)
    assert process.store.notes["alive/0"].endswith(" 1"), "the others need not miss it"


def test_who_has_finished_is_not_missed() -> None:
    process = Watched()
    process.other("7 1 1")
    process.told = True
    assert process.waits(1.2, other_lives=False)
    process.watchdog.close(finished=False)
    assert process.store.notes["alive/0"].endswith(" 0")


def test_a_lost_launcher_is_as_good_as_being_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Watched()
    assert process.waits(0.6, other_lives=False)
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert not process.waits(20, other_lives=False)
    assert "the launcher ended, and process 1 has not answered for" in caplog.text
    process.watchdog.close(finished=False)


def test_without_a_store_only_progress_counts(caplog: pytest.LogCaptureFixture) -> None:
    process = Watched()
    process.store.answers, process.told = False, True
    for _ in range(40):
        process.watchdog.progress()
        assert process.waits(0.02)
    assert not process.waits(20)
    assert "the process that keeps the run's store does not answer" in caplog.text
    process.watchdog.close(finished=True)


def test_without_progress_of_anybody_it_names_who_is_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process = Watched(timeout=0.5)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            process.watchdog.progress()
        assert not process.waits(20)
    assert "process 1 has fallen behind" in caplog.text
    process.watchdog.close(finished=False)
