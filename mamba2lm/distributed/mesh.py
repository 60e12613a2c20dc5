"""How processes divide the work: the degrees a user asks for and the groups that come of them."""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mamba2lm.distributed.context import ContextGroup
from mamba2lm.distributed.tensor import TensorGroup
from mamba2lm.schema import ConfigError


@dataclass
class ParallelConfig:
    """Degrees of parallelism; their product is the number of processes."""

    tensor: int = 1
    """Processes that share every layer's heads and channels, and the vocabulary."""
    data_shard: int = 1
    """Processes with different samples that keep a part each of weights, gradients and moments."""
    data_replicate: int | None = None
    """Such groups with weights of their own; null takes the processes that are left over."""
    context: int = 1
    """Processes that share the length of every sequence; they share weights like data_shard."""
    keep_gathered: bool = False
    """Gather what data_shard and context divide once a step, not for every pass: less to send, for
    a whole copy of the weights in the dtype of the matrix products."""
    sequence_parallel: bool = False
    """Between layers, split activations along the sequence over the processes of ``tensor``."""
    timeout: float = 600.0
    """Seconds without progress after which a run ends, naming the process that does not answer."""

    def validate(self) -> None:
        """Check each degree by itself.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        for name in ("tensor", "data_shard", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}", getattr(self, name), "must be ≥ 1.")
        if self.data_replicate is not None and self.data_replicate < 1:
            raise ConfigError(
                "parallel.data_replicate",
                self.data_replicate,
                "must be ≥ 1, or null for the processes left over.",
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence_parallel", True, "splits over parallel.tensor, which is 1."
            )
        if self.keep_gathered and self.data_shard * self.context == 1:
            raise ConfigError(
                "parallel.keep_gathered",
                True,
                "is about weights that parallel.data_shard or parallel.context divide; both are 1.",
            )
        if not self.timeout > 0:
            raise ConfigError("parallel.timeout", self.timeout, "must be positive.")

    def degrees(self, processes: int) -> Degrees:
        """Return the degrees of a run of so many processes.

        Raises:
            ConfigError: Their product is another number.
        """
        self.validate()
        inner = self.tensor * self.data_shard * self.context
        shown = " × ".join(
            f"{name} {getattr(self, name)}" for name in ("tensor", "data_shard", "context")
        )
        if processes % inner:
            key = next(
                name for name in ("tensor", "context", "data_shard") if getattr(self, name) > 1
            )
            raise ConfigError(
                f"parallel.{key}",
                getattr(self, key),
                f"{shown} = {inner} does not divide the number of processes, {processes}; "
                f"start {inner} or a multiple of it.",
            )
        replicate = processes // inner if self.data_replicate is None else self.data_replicate
        if replicate * inner != processes:
            raise ConfigError(
                "parallel.data_replicate",
                self.data_replicate,
                f"times {shown} is {replicate * inner}, but {processes} were started; start "
                f"{replicate * inner}, or leave it null.",
            )
        return Degrees(replicate, self.data_shard, self.context, self.tensor)


@dataclass(frozen=True)
class Degrees:
    """Numbers of processes along each axis, outermost first; neighbours share tensors."""

    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def processes(self) -> int:
        """All of them."""
        return math.prod((self.data_replicate, self.data_shard, self.context, self.tensor))

    @property
    def sharded(self) -> bool:
        """Whether a process holds less than the whole model, or less than whole sequences."""
        return self.data_shard * self.context * self.tensor > 1


class Mesh:
    """The groups that this process belongs to.

    Attributes:
        degrees: Processes along each axis.
        rank: This process among all.
        data_rank: This process among those with different samples.
        data_size: How many those are.
        keep_gathered: Whether weights stay gathered from a step's first pass to its last.
        tensor: Whom it shares tensors with; None when nobody.
        context: Whom it shares sequences with; None when nobody.
        parameters: Axes ``replicate`` (equal weights), ``shard`` (a part of the weights each) and
            ``tensor``; None for one process and for plain data parallelism.
        tokens: The processes that have different tokens and the same part of every tensor; None
            when this one has all, and for plain data parallelism.
    """

    def __init__(
        self, config: ParallelConfig, *, rank: int, processes: int, device: torch.device
    ) -> None:
        """Make the groups; every process of the run calls this at the same point.

        Raises:
            ConfigError: The degrees do not multiply to the number of processes.
        """
        self.degrees = degrees = config.degrees(processes)
        self.rank = rank
        self.data_size = degrees.data_replicate * degrees.data_shard
        self.keep_gathered = config.keep_gathered
        self.data_rank = rank // (degrees.context * degrees.tensor)
        self.tensor: TensorGroup | None = None
        self.context: ContextGroup | None = None
        self.parameters: DeviceMesh | None = None
        self.tokens: dist.ProcessGroup | None = None
        if not degrees.sharded:
            return
        shard = degrees.data_shard * degrees.context
        self.parameters = init_device_mesh(
            device.type,
            (degrees.data_replicate, shard, degrees.tensor),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )
        if degrees.processes > degrees.tensor:
            mesh = init_device_mesh(
                device.type,
                (degrees.data_replicate * shard, degrees.tensor),
                mesh_dim_names=("tokens", "tensor"),
            )
            self.tokens = mesh.get_group("tokens")
        if degrees.tensor > 1:
            self.tensor = TensorGroup(
                self.parameters.get_group("tensor"),
                rank % degrees.tensor,
                degrees.tensor,
                over_sequence=config.sequence_parallel,
            )
        if degrees.context > 1:
            mesh = init_device_mesh(
                device.type,
                (self.data_size, degrees.context, degrees.tensor),
                mesh_dim_names=("data", "context", "tensor"),
            )
            self.context = ContextGroup(
                mesh.get_group("context"),
                rank // degrees.tensor % degrees.context,
                degrees.context,
            )

    def check_length(self, length: int) -> None:
        """Refuse sequences that do not divide over the processes that share them.

        Args:
            length: Tokens of a sequence.

        Raises:
            ConfigError: No multiple, or stretches would be shorter than convolutions.
        """
        context = self.degrees.context
        split = self.tensor is not None and self.tensor.over_sequence
        parts = context * (self.degrees.tensor if split else 1)
        if length % parts:
            raise ConfigError(
                "data.sequence_length",
                length,
                f"must be a multiple of {parts}, the processes that share a sequence "
                "(parallel.context, and parallel.tensor with sequence_parallel).",
            )
        if context > 1 and length // context < 4:
            raise ConfigError(
                "data.sequence_length", length, f"must be at least {4 * context}: "
                "4 tokens for each of parallel.context.",
            )  # fmt: skip

    @property
    def copies(self) -> int:
        """Number of processes that read the same tokens, and hence have the same loss."""
        return self.degrees.tensor

    @property
    def shard_rank(self) -> int:
        """This process among those that keep a part each of the weights."""
        degrees = self.degrees
        return self.rank // degrees.tensor % (degrees.data_shard * degrees.context)

    @property
    def replicate_rank(self) -> int:
        """This process's group among those with equal weights."""
        degrees = self.degrees
        return self.rank // (degrees.tensor * degrees.data_shard * degrees.context)


def join_tensor_group(device: torch.device) -> TensorGroup | None:
    """Have all processes that torchrun started share one model, to run it: nobody trains.

    Args:
        device: Where this process computes.

    Returns:
        The group; None for a single process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    assert dist.group.WORLD is not None
    return TensorGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
