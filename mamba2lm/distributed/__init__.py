"""Processes and what they exchange; knows no layer."""

from mamba2lm.distributed.mesh import ParallelConfig
from mamba2lm.distributed.world import World

__all__ = ["ParallelConfig", "World"]
