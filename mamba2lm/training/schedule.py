"""Learning-rate schedules: a pure function of the step, so resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from mamba2lm.schema import ConfigError


class ScheduleKind(Enum):
    """Shapes of the learning rate over the run."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


@dataclass
class ScheduleConfig:
    """Warm-up, then a plateau or a decay."""

    kind: ScheduleKind = ScheduleKind.cosine
    """cosine; wsd (warm-up–stable–decay, linear to the end: Hu et al. 2024); constant."""
    warmup_steps: int = 100
    min_ratio: float = 0.1
    """Final over peak learning rate."""
    decay_fraction: float = 0.2
    """wsd: share of the run spent decaying."""

    def validate(self) -> None:
        """Check ranges; raise ConfigError."""
        if self.warmup_steps < 0:
            raise ConfigError("schedule.warmup_steps", self.warmup_steps, "must be ≥ 0.")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError("schedule.min_ratio", self.min_ratio, "must be in [0, 1].")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError("schedule.decay_fraction", self.decay_fraction, "must be in [0, 1].")


def learning_rate_ratio(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Return the learning rate of a step over the peak one.

    Args:
        config: The schedule.
        step: Optimizer steps done before this one, 0 ≤ step.
        max_steps: Steps of the whole run.

    Returns:
        In (0, 1]: linear from 1/warmup to 1, then as ``config.kind`` says, ``min_ratio`` at the
        last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind is ScheduleKind.constant:
        return 1.0
    begin = config.warmup_steps
    if config.kind is ScheduleKind.wsd:
        begin = max(begin, max_steps - round(config.decay_fraction * max_steps))
    progress = min(max((step + 1 - begin) / max(max_steps - begin, 1), 0.0), 1.0)
    if config.kind is ScheduleKind.cosine:
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return 1.0 - (1.0 - config.min_ratio) * progress
