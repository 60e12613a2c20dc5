"""Speed, waiting and memory of the steps between two rows of metrics."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from mamba2lm.distributed import World
from mamba2lm.training.hardware import memory_in_use, peak_flops
from mamba2lm.training.profile import StepProfile


class Meter:
    """Time steps, on every process, and sum them up for the one that writes."""

    def __init__(
        self, world: World, *, dtype: torch.dtype, flops_per_token: float, peak_tflops: float | None
    ) -> None:
        """Begin with no step.

        Args:
            world: The processes.
            dtype: Of the matrix products, whose peak MFU refers to.
            flops_per_token: Of a training step, forward and backward.
            peak_tflops: Of one device; None looks it up, or measures it, when first needed.
        """
        self._world, self._dtype, self._flops_per_token = world, dtype, flops_per_token
        self._peak = None if peak_tflops is None else peak_tflops * 1e12
        self._begin = 0.0
        self._start_anew()

    def _start_anew(self) -> None:
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._data_wait = 0.0
        self._waited = 0.0
        self._profile: StepProfile | None = None

    def begin_step(self) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def data_arrived(self) -> None:
        """Note that the step has its batches."""
        self._data_wait += time.perf_counter() - self._begin

    def learned(self, loss: float, grad_norm: float) -> None:
        """Count the loss of a step that was taken."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)

    def profiled(self, profile: StepProfile) -> None:
        """Take the figures of a step that was profiled; the last before a row is written."""
        self._profile = profile

    def end_step(self, *, tokens: int, waited: float) -> float:
        """Stop the clock.

        Args:
            tokens: Of the step, over all processes.
            waited: Seconds of it that this process waited for others.

        Returns:
            Seconds that the step took.
        """
        seconds = time.perf_counter() - self._begin
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited
        return seconds

    def row(self) -> dict[str, Any]:
        """Sum up the steps since the last row; every process has to call it."""
        world, seconds = self._world, max(self._seconds, 1e-9)
        busy = (self._seconds - self._waited) / self._steps
        busy_p, memory_p = world.gather(busy, memory_in_use(world.device)).t().tolist()
        if self._peak is None:  # to measure it takes a while, and one process writes
            self._peak = peak_flops(world.device, self._dtype) if world.is_main else math.nan
        speed = self._tokens / seconds
        row = {
            "loss": mean(self._losses),
            "grad_norm": mean(self._grad_norms),
            "tokens_per_second": speed,
            "mfu": speed * self._flops_per_token / (self._peak * world.size),
            "memory_bytes": int(max(memory_p)),
            "data_wait_fraction": self._data_wait / seconds,
        }
        if world.size > 1:
            row |= {
                "step_seconds_min": min(busy_p),
                "step_seconds_max": max(busy_p),
                "slowest_process": busy_p.index(max(busy_p)),
                "wait_fraction": self._waited / seconds,
            }
        if self._profile is not None:
            row["communication_fraction"] = self._profile.communication
            if self._profile.exposed is not None:
                row["exposed_communication_fraction"] = self._profile.exposed
                row["idle_fraction"] = self._profile.idle
        self._start_anew()
        return row


def mean(values: list[float]) -> float:
    """Return the mean, NaN of nothing (every step was skipped)."""
    return sum(values) / len(values) if values else math.nan
