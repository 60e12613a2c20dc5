"""Where the time of an engine's thread goes, and how long its GPU has nothing to do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest import mock

import torch

from mamba2lm.inference import Engine
from mamba2lm.inference.batch import Flight
from mamba2lm.inference.decoding import Row


class Parts:
    """Watches an engine while it is entered; one thread uses it.

    Time within a part does not count for the part around it. ``waiting`` is the host's for the GPU;
    all else is the host's own work, as the clock on the wall sees it: in a server it holds what the
    thread waited for the interpreter too.
    """

    def __init__(self, engine: Engine, flight: type[Flight] = Flight) -> None:
        """Watch nothing yet.

        Args:
            engine: In use by this thread, or by one other alone.
            flight: What its batch fetches tokens with.
        """
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0
        self._patches = ExitStack()
        self._stats = engine.stats
        self._steps = engine.stats.steps
        self._on_gpu = engine.device.type == "cuda"
        self._busy: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._watched: list[tuple[Any, str, str]] = [
            (engine, "advance", "scheduling"),
            (engine, "_admit", "admitting"),
            (engine._prefill, "advance", "reading prompts"),
            (engine, "_start", "joining"),
            (engine.batch, "leave", "leaving"),
            (engine.batch, "launch", "launching steps"),
            (flight, "wait", "waiting"),
            (flight, "tokens", "fetching"),
            (engine, "_push", "handing out"),
            (Row, "extend", "text"),
            (engine, "_tell", "telling"),
        ]

    def __enter__(self) -> Parts:
        for owner, name, part in self._watched:
            watched = self._timed(getattr(owner, name), part)
            if self._on_gpu and part in ("reading prompts", "launching steps"):
                watched = self._marked(watched)
            self._patches.enter_context(mock.patch.object(owner, name, watched))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patches.close()

    def figures(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Return microseconds a token by part, and the share of the time that the GPU waited.

        ``rows_per_step`` counts tokens of use: rows that ended within a stride are not in it.

        Args:
            tokens: Drawn meanwhile.
            seconds: That it took.
        """
        steps = max(self._stats.steps - self._steps, 1)
        found: dict[str, Any] = {
            "us_per_step": round(seconds / steps * 1e6, 1),
            "rows_per_step": round(tokens / steps, 2),
            "us_per_token": {
                part: round(used / tokens * 1e6, 3)
                for part, used in sorted(self.seconds.items(), key=lambda item: -item[1])
            },
        }
        if self._on_gpu:
            torch.cuda.synchronize()
            busy = sum(begin.elapsed_time(end) for begin, end in self._busy) / 1e3
            found["gpu_waits"] = round(1 - busy / seconds, 3)
        return found

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._charge()
            self._stack.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self._charge()
                self._stack.pop()

        return timed

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _marked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let the GPU say when it begins and ends with what a function asks of it."""

        def marked(*arguments: Any, **named: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                return function(*arguments, **named)
            finally:
                end.record()
                self._busy.append((begin, end))

        return marked
