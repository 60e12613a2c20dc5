"""CUDA graphs of what the engine does again and again, by shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


class Graphs(Generic[T]):
    """Recorded functions without arguments, whose results lie in the same memory each time."""

    def __init__(self, what: str) -> None:
        """Begin with none; ``what`` they are is for the log."""
        self._what = what
        self._by_shape: dict[tuple[object, ...], Callable[[], T]] = {}
        self._pool: Any = None

    def recorded(
        self, shape: tuple[object, ...], once: Callable[[], T], scratch: Callable[[], T]
    ) -> Callable[[], T]:
        """Return what replays ``once``, recording it where this shape is new.

        Args:
            shape: What the shapes in it depend on.
            once: The function; recording does not run it.
            scratch: The same without effects, run first so that everything is compiled.
        """
        if shape not in self._by_shape:
            try:
                self._by_shape[shape] = self._record(once, scratch)
            except RuntimeError as error:
                # A mixer may do what a graph cannot hold; it then runs as it does elsewhere.
                log.warning(
                    "%s of shape %s cannot be recorded and runs op by op: %s",
                    self._what,
                    shape,
                    error,
                )
                self._by_shape[shape] = once
        return self._by_shape[shape]

    def _record(self, once: Callable[[], T], scratch: Callable[[], T]) -> Callable[[], T]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                scratch()
        torch.cuda.current_stream().wait_stream(aside)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = once()

        def replay() -> T:
            graph.replay()
            return result

        return replay
