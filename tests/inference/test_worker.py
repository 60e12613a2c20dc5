"""The way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from mamba2lm.inference import Engine
from mamba2lm.inference.decoding import FinishReason
from mamba2lm.inference.worker import Piece, Ticket, Worker
from tests.inference import helpers


def piece(text: str, reason: FinishReason | None = None) -> Piece:
    return Piece(0, text, 1, [], reason, None, 0.0)


def test_pieces_of_one_text_go_together_and_ends_do_not_wait() -> None:
    worker = Worker(Engine(helpers.model("MM"), helpers.tokenizer()), max_waiting=4)
    calls: list[Any] = []

    async def run() -> list[list[Piece]]:
        loop = asyncio.get_running_loop()
        worker._loop = loop
        schedule = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            return schedule(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        going, ending = Ticket(), Ticket()
        worker._say(going, piece("a"))
        worker._say(ending, piece("x"))
        worker._say(going, piece("b"))
        worker._say(ending, piece("y", "stop"))
        worker._flush(only_ends=True)
        await asyncio.sleep(0)
        assert going.pieces.empty()
        worker._say(going, piece("c"))
        worker._flush()
        worker._flush()
        await asyncio.sleep(0)
        return [[t.pieces.get_nowait() for _ in range(t.pieces.qsize())] for t in (going, ending)]

    (whole,), (end,) = asyncio.run(run())
    assert (whole.text, whole.tokens, whole.finish_reason) == ("abc", 3, None)
    assert (end.text, end.tokens, end.finish_reason) == ("xy", 2, "stop")
    assert len(calls) == 2


def test_a_delivery_waits_until_the_last_one_is_written() -> None:
    worker = Worker(Engine(helpers.model("MM"), helpers.tokenizer()), max_waiting=4)
    seconds = 0.02

    async def run() -> list[bool]:
        worker._loop = asyncio.get_running_loop()
        ticket, due = Ticket(), [worker._due()]

        async def write() -> None:
            await ticket.pieces.get()
            time.sleep(seconds)

        writing = asyncio.create_task(write())
        await asyncio.sleep(0)
        worker._say(ticket, piece("a"))
        worker._flush()
        due.append(worker._due())
        await writing
        await asyncio.sleep(0)
        due.append(worker._due())
        # What ends goes at once, and says nothing of how long a delivery to all takes.
        worker._say(ticket, piece("b", "stop"))
        worker._flush(only_ends=True)
        await asyncio.sleep(0)
        assert ticket.pieces.qsize() == 1
        assert worker._writing_seconds >= seconds
        worker._delivered_at -= 2 * worker._writing_seconds
        return [*due, worker._due()]

    assert asyncio.run(run()) == [True, False, False, True]


def test_a_loop_that_was_held_up_does_not_hold_streams_up_once_more() -> None:
    worker = Worker(Engine(helpers.model("MM"), helpers.tokenizer()), max_waiting=4)
    worker._writing_seconds = 60.0
    worker._delivered_at = time.perf_counter() - 0.2
    assert not worker._due()
    worker._delivered_at -= 0.4
    assert worker._due()


def test_the_thread_computes_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Engine(helpers.model("MM"), helpers.tokenizer()), max_waiting=4)
    chosen: list[tuple[torch.device, str]] = []

    def choose(device: torch.device) -> None:
        chosen.append((device, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(Engine, "device", torch.device("cuda", 1))

    async def run() -> None:
        worker.start()
        worker.stop()
        await asyncio.to_thread(worker.join)

    asyncio.run(run())
    assert chosen == [(torch.device("cuda", 1), "engine")]
