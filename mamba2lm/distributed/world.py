"""The few collectives that the trainer needs besides gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class World:
    """This process among its equals."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Add numbers over processes.

        Args:
            values: Python numbers or scalar tensors.

        Returns:
            float64 tensor (len(values),) on the device.
        """
        total = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        )
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return bool(self.sum(float(flag)).item() > 0)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()
