"""The few collectives of numbers and decisions that a program needs besides its tensors'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mamba2lm.schema import ConfigError

T = TypeVar("T")


@dataclass
class World:
    """This process among its equals."""

    rank: int
    size: int
    device: torch.device
    copies: int = 1
    """Processes that have the same tokens, so that sums over tokens count each so many times."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Add numbers over processes.

        Args:
            values: Python numbers or scalar tensors.

        Returns:
            float64 tensor (len(values),), on the device unless nothing that comes from there and
            no other process is needed: then the host need not wait for the device.
        """
        if self.size == 1 and not any(isinstance(v, torch.Tensor) for v in values):
            return torch.tensor(values, dtype=torch.float64)
        total = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        )
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def sum_over_tokens(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Add numbers that belong to tokens over processes, each token once."""
        return self.sum(*values) / self.copies

    def gather(self, *values: float) -> torch.Tensor:
        """Return every process's numbers, float64 (size, len(values)) on the device."""
        gathered = torch.zeros(self.size, len(values), dtype=torch.float64, device=self.device)
        gathered[self.rank] = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(gathered)
        return gathered

    def decide(self, make: Callable[[], T]) -> T:
        """Call a function on the main process and return its result on all.

        Raises:
            ConfigError: The function raised it; on all.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except ConfigError as error:
                outcome[1] = {"key": error.key, "value": error.value, "remedy": error.remedy}
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise ConfigError(**outcome[1])
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return bool(self.sum(float(flag)).item() > 0)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()
