"""The thread that runs the engine, and the way to it from an event loop.

The engine knows no threads: whatever is asked of it is queued here and done between two of its
steps. What it has to say goes back in one call for all rows, and the more rows the less often, so
that a loop serving many streams is woken once for all of them and has time for each.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from mamba2lm.inference.decoding import FinishReason, TokenLogprob
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.request import Event, Job, Request
from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.inference.session import Session
from mamba2lm.schema import ConfigError

log = logging.getLogger(__name__)

_EVICTED_REMEMBERED = 10_000
# Between two deliveries, for each running row, and in times of what the event loop took to write
# the last one: it leaves the interpreter to the engine's thread for most of the time.
_PIECE_SECONDS = 3e-4
_PAUSES = 2.0
# Whatever held the loop up was not always writing: streams must not pay for it once more.
_LONGEST_PAUSE = 0.5


class BusyError(Exception):
    """The queue is full, or the server is shutting down."""


class SessionBusyError(Exception):
    """A session has one turn at a time."""


class SessionGoneError(Exception):
    """A session's state was given up for others'."""


@dataclass
class Turn:
    """A session's turn: what ``Session.turn`` needs, as the session is known to the worker only."""

    session: str
    new_ids: list[int]
    sampling: SamplingConfig
    max_new_tokens: int
    seed: int
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass
class Piece:
    """What a step has brought for one continuation, as the event loop gets it."""

    row: int
    text: str
    tokens: int
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    error: Exception | None
    at: float
    """When, by ``time.perf_counter``."""

    def followed_by(self, later: Piece) -> Piece:
        """Return it with the next of the same continuation."""
        return Piece(
            self.row,
            self.text + later.text,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.error,
            later.at,
        )


@dataclass(eq=False)
class Ticket:
    """A submitted request as the event loop sees it."""

    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    job: Job | None = None
    """Once the worker has begun with it."""
    submitted_at: float = field(default_factory=time.perf_counter)


class Worker:
    """Run an engine in a thread of its own."""

    def __init__(self, engine: Engine, *, max_waiting: int, session_bytes: int = 0) -> None:
        """Start nothing yet.

        Args:
            engine: Used by nobody else from ``start`` on.
            max_waiting: Most prompts queued.
            session_bytes: Budget of sessions' states.
        """
        self.engine = engine
        self.max_waiting = max_waiting
        self.session_bytes = session_bytes
        self.sessions_evicted = 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._busy: set[str] = set()
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._tickets: dict[Ticket, str | None] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._queued = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._out: dict[tuple[Ticket, int], Piece] = {}
        self._delivered_at = 0.0
        self._deliveries = 0
        # The event loop's own.
        self._written = 0
        self._writing_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Prompts that no token has been read of."""
        return self._queued + self.engine.waiting

    @property
    def sessions(self) -> int:
        """Sessions kept."""
        return len(self._sessions)

    @property
    def sessions_nbytes(self) -> int:
        """Bytes of their states."""
        return sum(session.state.nbytes for session in list(self._sessions.values()))

    def start(self) -> None:
        """Start the thread; pieces are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after its current step; what is unfinished ends as interrupted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self, timeout: float = 10.0) -> None:
        """Wait for it."""
        self._thread.join(timeout)

    def submit(self, requests: list[Request | Turn]) -> list[Ticket]:
        """Queue requests, all or none.

        Raises:
            BusyError: There is no room in the queue.
        """
        with self._wake:
            if self._stopping or self.waiting + len(requests) > self.max_waiting:
                raise BusyError
            tickets = [Ticket() for _ in requests]
            self._queued += len(requests)
            for ticket, request in zip(tickets, requests, strict=True):
                self._commands.append(lambda t=ticket, r=request: self._begin(t, r))
            self._wake.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a request that nobody waits for any more; nothing if it has ended."""
        self._command(lambda: self._end(ticket))

    def forget(self, session: str, then: Callable[[Literal["done", "busy", "none"]], None]) -> None:
        """Drop a session; ``then`` hears in the event loop what came of it."""

        def drop() -> None:
            found: Literal["done", "busy", "none"] = "none"
            if session in self._busy:
                found = "busy"
            elif session in self._sessions or session in self._gone:
                found = "done"
                self._sessions.pop(session, None)
                self._gone.pop(session, None)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(then, found)

        self._command(drop)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                # Each thread has a current device of its own, at first cuda:0.
                torch.cuda.set_device(self.engine.device)
            self._work()
            for ticket in list(self._tickets):
                self._end(ticket)
        except Exception as error:
            # The engine ends failed requests itself; this is a mistake of ours, and the end.
            log.exception("the engine's thread has failed")
            for ticket in self._tickets:
                self._say(ticket, Piece(0, "", 0, [], None, error, time.perf_counter()))
        finally:
            self._stopping = True
            self._flush()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or not self.engine.idle):
                    self._wake.wait()
                if self._stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            if not self.engine.idle:
                self.engine.advance()
            self._flush(only_ends=not (self.engine.idle or self._due()))

    def _due(self) -> bool:
        """Return whether it is time for the next delivery, and the last one has been written."""
        writing = min(_PAUSES * self._writing_seconds, _LONGEST_PAUSE)
        pause = max(len(self.engine.batch) * _PIECE_SECONDS, writing)
        waited = time.perf_counter() - self._delivered_at
        return waited >= pause and self._written == self._deliveries

    def _begin(self, ticket: Ticket, request: Request | Turn) -> None:
        with self._wake:
            self._queued -= 1
        name: str | None = None
        try:
            if isinstance(request, Turn):
                name = request.session
                request = self._turn(request)
                self._busy.add(name)
            job = self.engine.submit(request, lambda event: self._hear(ticket, event))
        except (ConfigError, SessionBusyError, SessionGoneError) as error:
            # Checked as far as can be known before; what is left depends on the session.
            if name is not None and not isinstance(error, SessionBusyError):
                self._busy.discard(name)
            self._say(ticket, Piece(0, "", 0, [], None, error, time.perf_counter()))
            return
        ticket.job = job
        self._tickets[ticket] = name

    def _turn(self, turn: Turn) -> Request:
        if turn.session in self._busy:
            raise SessionBusyError
        if turn.session in self._gone:
            raise SessionGoneError
        session = self._sessions.get(turn.session) or Session(self.engine)
        self._sessions[turn.session] = session
        request = session.turn(turn.new_ids, turn.sampling, turn.max_new_tokens, turn.seed)
        request.logprobs, request.ignore_eos = turn.logprobs, turn.ignore_eos
        return request

    def _hear(self, ticket: Ticket, event: Event) -> None:
        self._say(
            ticket,
            Piece(
                event.row,
                event.text,
                event.tokens,
                event.logprobs,
                event.finish_reason,
                event.job.error,
                time.perf_counter(),
            ),
        )
        if event.job.done:
            self._settle(ticket, event.job)

    def _say(self, ticket: Ticket, piece: Piece) -> None:
        before = self._out.get((ticket, piece.row))
        self._out[ticket, piece.row] = piece if before is None else before.followed_by(piece)

    def _settle(self, ticket: Ticket, job: Job) -> None:
        name = self._tickets.pop(ticket, None)
        if name is None:
            return
        self._busy.discard(name)
        session = self._sessions[name]
        session.absorb(job)
        self._sessions.move_to_end(name)
        total = self.sessions_nbytes
        while total > self.session_bytes:
            idle = next((n for n in self._sessions if n not in self._busy), None)
            if idle is None:
                break
            total -= self._sessions.pop(idle).state.nbytes
            self.sessions_evicted += 1
            self._gone[idle] = None
            if len(self._gone) > _EVICTED_REMEMBERED:
                self._gone.popitem(last=False)

    def _end(self, ticket: Ticket) -> None:
        if ticket.job is not None and ticket in self._tickets:
            self.engine.cancel(ticket.job)

    def _flush(self, *, only_ends: bool = False) -> None:
        """Deliver what there is, or only what ends: its client may have more to ask."""
        out, self._out = self._out, {}
        if only_ends:
            self._out = {
                key: piece
                for key, piece in out.items()
                if piece.finish_reason is None and piece.error is None
            }
            out = {key: piece for key, piece in out.items() if key not in self._out}
        else:
            self._delivered_at = time.perf_counter()
        if out and self._loop is not None and not self._loop.is_closed():
            self._deliveries += not only_ends
            self._loop.call_soon_threadsafe(self._deliver, out, not only_ends)

    def _deliver(self, out: dict[tuple[Ticket, int], Piece], timed: bool) -> None:
        """Hand pieces to those who write them; in the event loop."""
        began = time.perf_counter()
        for (ticket, _), piece in out.items():
            ticket.pieces.put_nowait(piece)
        if timed:
            # They have been woken, and have their turns before this.
            asyncio.get_running_loop().call_soon(self._note_written, began)

    def _note_written(self, began: float) -> None:
        self._writing_seconds = time.perf_counter() - began
        self._written += 1
