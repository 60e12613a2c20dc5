"""How processes divide the work."""

from __future__ import annotations

from dataclasses import dataclass

from mamba2lm.schema import ConfigError


@dataclass
class ParallelConfig:
    """Degrees of parallelism; every process that is left over replicates the model."""

    tensor: int = 1
    """Processes that share one model's heads and channels. Only 1 in this version."""

    def validate(self) -> None:
        """Check the degrees.

        Raises:
            ConfigError: A degree this version does not have.
        """
        if self.tensor != 1:
            raise ConfigError(
                "parallel.tensor",
                self.tensor,
                "this version trains by data parallelism only; use 1 and start more processes.",
            )
