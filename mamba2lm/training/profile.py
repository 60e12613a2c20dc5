"""Where the time of a step goes on this process: in communication, or in nothing at all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

_COLLECTIVES = ("nccl", "gloo:")  # what is in the names of their events


@dataclass
class StepProfile:
    """What was seen between the beginning and the end of ``profile_step``."""

    communication: float = 0.0
    """Share of the time in which a collective was under way."""
    exposed: float | None = None
    """Share in which the device did nothing but communicate; None on a CPU."""
    idle: float | None = None
    """Share in which the device did nothing at all, waiting for the host; None on a CPU."""
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Milliseconds and launches by name, those that take longest first; empty on a CPU."""


@contextlib.contextmanager
def profile_step(device: torch.device) -> Iterator[StepProfile]:
    """Profile what runs inside; the figures are there at the end.

    Recording slows the host down, so that shares of a step that the host holds up come out larger.

    Args:
        device: Where the step computes. Of a GPU all kernels are seen; of a CPU, where collectives
            run beside the program, when they began and ended.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    activity = getattr(torch.profiler.ProfilerActivity, kind.upper())
    found = StepProfile()
    _wait(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        begin = time.perf_counter_ns()
        yield found
        _wait(device)
        whole = time.perf_counter_ns() - begin
    # Not profile.events(), which takes a minute for the kernels of a large model.
    results = None if profile.profiler is None else profile.profiler.kineto_results
    assert results is not None
    on = getattr(DeviceType, kind.upper())
    events = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == on
    ]
    collectives = [(a, b) for name, a, b in events if _communicates(name)]
    if kind == "cpu":
        found.communication = min(covered(collectives) / whole, 1.0)
        return
    if not events:
        return
    computing = covered([(a, b) for name, a, b in events if not _communicates(name)])
    everything = covered([(a, b) for _, a, b in events])
    whole = max(b for _, _, b in events) - min(a for _, a, _ in events)
    found.communication = covered(collectives) / whole
    found.exposed = (everything - computing) / whole
    found.idle = 1 - everything / whole
    totals: dict[str, tuple[float, int]] = {}
    for name, a, b in events:
        milliseconds, launches = totals.get(name[:100], (0.0, 0))
        totals[name[:100]] = milliseconds + (b - a) / 1e6, launches + 1
    found.kernels = dict(sorted(totals.items(), key=lambda item: -item[1][0]))


def covered(spans: list[tuple[int, int]]) -> int:
    """Return the length of a union of intervals."""
    total, end = 0, None
    for a, b in sorted(spans):
        if end is None or a > end:
            total, end = total + b - a, b
        elif b > end:
            total, end = total + b - end, b
    return total


def _communicates(name: str) -> bool:
    return any(word in name.lower() for word in _COLLECTIVES)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
