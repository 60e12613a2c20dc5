"""Get through a library's Triton autotuning in little time, so that what it chose can be timed.

An autotuned kernel compiles its configurations one after another, when the first call with new
sizes has come to them. ``compile_ahead`` compiles them beforehand, in several processes that share
Triton's cache; ``tune_briefly`` shortens how long each is then timed.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def compiling(index: int, count: int) -> Iterator[list[str]]:
    """Compile a share of all autotuned configurations instead of launching the kernels.

    What such a kernel would have written is left as it is. Kernels without configurations to choose
    from are launched as ever.

    Args:
        index: Which share: every ``count``-th configuration from this one on, in the order in which
            a program comes to them.
        count: How many shares there are.

    Yields:
        What could not be compiled, as it comes; autotuning passes such configurations over too.
    """
    from triton.runtime.autotuner import Autotuner

    position = itertools.count()
    failed: list[str] = []

    def compile_share(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        self.best_config = configs[0]  # callers may ask; any will do
        for config in configs:
            if next(position) % count != index:
                continue
            try:
                binary = self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
                _ = binary.run  # builds what launches it, which Triton caches too
            except Exception as error:
                failed.append(f"{self.base_fn.__name__} {config}: {type(error).__name__}: {error}")
        self.nargs = None

    with mock.patch.object(Autotuner, "run", compile_share):
        yield failed


def _compile_share(work: Callable[[], object], index: int, count: int) -> list[str]:
    with compiling(index, count) as failed:
        work()
    return failed


def compile_ahead(work: Callable[[], object], jobs: int) -> list[str]:
    """Compile all autotuned configurations that a function would have to time.

    Args:
        work: Calls what is to be timed later with the same sizes; a function of a module, or a
            ``functools.partial`` of one, as other processes run it. It must not look at results.
        jobs: How many processes.

    Returns:
        What could not be compiled.
    """
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        shares = pool.starmap(_compile_share, [(work, i, jobs) for i in range(jobs)], 1)
    return [line for share in shares for line in share]


def tune_briefly(warmup_ms: int = 5, timed_ms: int = 25) -> None:
    """Let every autotuner of this process time a configuration this long, not 25 and 100 ms."""
    from triton.runtime import driver
    from triton.testing import do_bench

    timer = functools.partial(do_bench, warmup=warmup_ms, rep=timed_ms)
    active: Any = driver.active
    active.get_benchmarker = lambda: timer
