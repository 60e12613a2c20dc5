"""Tensor parallelism: how a weight is divided over processes, as data, and what makes it so.

A layer says of each weight, in a plan, which rows (or columns) belong to which units: heads,
groups, channels. Of every segment each process *stores* an equal part, as a DTensor, so clipping,
the optimizer and FSDP treat all weights alike. What it *computes* with is a plain tensor: its
stored part, except where a segment has fewer units than there are processes (the one group of B
and C, few key-value heads). Such a segment is gathered at each use, in one collective for a whole
layer, and its gradient is scattered back as a sum: no weight is ever held twice, and no gradient
has to be remembered as partial.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mamba2lm.distributed.collectives import (
    copy_to_parts,
    gather_for_parts,
    gather_same,
    reduce_scatter,
    scatter_sum_of_parts,
    sum_for_parts,
    sum_of_parts,
)


@dataclass(frozen=True)
class TensorGroup:
    """The processes that share every layer's heads.

    Attributes:
        group: They.
        rank: This process among them.
        size: How many they are.
        over_sequence: Whether activations between layers are split along the sequence (axis 1).
            The gradients of replicated weights are then parts of a sum.
    """

    group: ProcessGroup
    rank: int
    size: int
    over_sequence: bool = False

    def whole(self) -> TensorGroup:
        """Return the same group with whole sequences between layers."""
        return dataclasses.replace(self, over_sequence=False)

    def enter(self, x: Tensor) -> Tensor:
        """Hand activations between layers to a layer that every process computes its part of.

        They come in the dtype of the layer's products, so that their gradients cross in it too.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.over_sequence:
            return gather_for_parts(x, 1, self.group)
        return copy_to_parts(x, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """Add up what the processes' parts of a layer give."""
        if self.over_sequence:
            return scatter_sum_of_parts(y, 1, self.group)
        return sum_of_parts(y, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Add over processes inside a layer: each goes on with its own part."""
        return sum_for_parts(x, self.group)

    def join(self, x: Tensor) -> Tensor:
        """Join the processes' parts along the last axis, the same for all."""
        return gather_same(x, x.ndim - 1, self.group)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows (or columns) of a weight that belong to units of equal width.

    Attributes:
        units: Number of units (heads, groups, channels).
        width: Rows of each.
        shared_by: For groups and key-value heads: how many heads share all units evenly. They may
            be fewer than the processes; without this, units have to divide evenly.
    """

    units: int
    width: int = 1
    shared_by: int | None = None

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.units * self.width

    def divides(self, size: int) -> bool:
        """Return whether each of ``size`` processes has units of its own."""
        return self.units % size == 0

    def fits(self, size: int) -> bool:
        """Return whether it can be stored and computed in ``size`` parts."""
        if self.divides(size):
            return True
        return self.shared_by is not None and self.shared_by % size == 0 and self.rows % size == 0

    def units_of(self, rank: int, size: int) -> list[int]:
        """Return the units that process ``rank`` of ``size`` computes with.

        Each serves an equal run of the process's own heads; one unit occurs several times where
        the boundaries of units and of processes fall apart (3 groups on 2 processes).
        """
        if self.divides(size):
            mine = self.units // size
            return list(range(rank * mine, (rank + 1) * mine))
        assert self.shared_by is not None
        heads, per_unit = self.shared_by // size, self.shared_by // self.units
        run = math.gcd(heads, per_unit)
        return [(rank * heads + head) // per_unit for head in range(0, heads, run)]


@dataclass(frozen=True)
class Split:
    """How one weight is divided.

    Attributes:
        segments: Of its axis ``dim``, in order.
        dim: 0 for what makes activations, 1 for what takes them.
        once: For the bias of a product that is summed over processes: the first one adds it.
        pad_rows: Zeros are added to what a process computes with, until its rows are a multiple of
            this: on a GPU, products whose rows are not of whole 16 bytes are slow.
    """

    segments: tuple[Segment, ...]
    dim: int = 0
    once: bool = False
    pad_rows: int = 0

    def gathers(self, size: int) -> bool:
        """Return whether a process computes with more than it stores."""
        return self.once or not all(segment.divides(size) for segment in self.segments)

    def stored(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Return (start, rows) on the whole weight of what a process stores, in order."""
        ranges, begin = [], 0
        for segment in self.segments:
            mine = segment.rows // size
            ranges.append((begin + rank * mine, mine))
            begin += segment.rows
        return ranges


Plan = Mapping[str, Split]
"""Parameter name → how it is divided, for every parameter of a mixer."""


def local_part(whole: Tensor, split: Split, rank: int, size: int) -> Tensor:
    """Cut what a process stores out of a whole weight."""
    ranges = split.stored(rank, size)
    return torch.cat([whole.narrow(split.dim, *part) for part in ranges], dim=split.dim)


class DistributedWeights:
    """The parameters of a module, stored in parts over a tensor group.

    After construction they are DTensors on ``mesh``; between ``begin`` and ``end`` the module has
    plain tensors in their place, of the size that this process computes with.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        tensor: TensorGroup,
        mesh: DeviceMesh | None,
        *,
        without: tuple[str, ...] = (),
    ) -> None:
        """Divide a module's parameters.

        Args:
            module: Whole on this process; parameters that ``plan`` does not name are replicated.
            plan: By parameter name within ``module``; every segment fits the group.
            tensor: The group.
            mesh: The group as a mesh of one axis; None for weights that are never trained, which
                become what this process computes with, once and for all.
            without: Children of ``module`` whose parameters are left alone.
        """
        self._places: list[tuple[nn.Module, str, Split | None]] = []
        size, rank = tensor.size, tensor.rank
        named = {
            name: parameter
            for name, parameter in module.named_parameters()
            if name.partition(".")[0] not in without
        }
        assert set(plan) <= set(named), "the plan names parameters that there are not"
        for name, parameter in named.items():
            owner_name, _, key = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            split = plan.get(name)
            self._places.append((owner, key, split))
            part = parameter.detach()
            if split is not None:
                assert sum(s.rows for s in split.segments) == part.shape[split.dim], name
                part = local_part(part, split, rank, size)
            if mesh is not None:
                placement: Placement = Replicate() if split is None else Shard(split.dim)
                part = part.to(mesh.device_type)
                part = DTensor.from_local(part, mesh, [placement], run_check=False)
            owner._parameters[key] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        if mesh is None:
            with torch.no_grad():
                local = [part.clone() for part in self._local(tensor)]
            for (owner, key, _), part in zip(self._places, local, strict=True):
                owner._parameters[key] = nn.Parameter(part, requires_grad=False)
            self._places = []

    def begin(self, tensor: TensorGroup) -> list[nn.Parameter | None]:
        """Put local tensors in the parameters' places; return the parameters.

        Args:
            tensor: The group, with or without split sequences.
        """
        stored = [owner._parameters[key] for owner, key, _ in self._places]
        for (owner, key, _), part in zip(self._places, self._local(tensor), strict=True):
            owner._parameters[key] = part  # type: ignore[assignment]
        return stored

    def end(self, stored: list[nn.Parameter | None]) -> None:
        """Put the parameters that ``begin`` returned back."""
        for (owner, key, _), parameter in zip(self._places, stored, strict=True):
            owner._parameters[key] = parameter

    def _local(self, tensor: TensorGroup) -> Sequence[Tensor]:
        """Return, in order, the tensors that this process computes with."""
        stored = [owner._parameters[key] for owner, key, _ in self._places]
        if not torch.compiler.is_compiling():
            return _Local.apply(self, tensor, *stored)
        parts = [
            _to_local(parameter, split)
            for parameter, (_, _, split) in zip(stored, self._places, strict=True)
            if parameter is not None
        ]
        return list(self.computed(parts, tensor))

    def computed(self, parts: list[Tensor], tensor: TensorGroup) -> Iterator[Tensor]:
        """Yield what is computed with, made of the parts that this process stores."""
        gathered = self._gather(parts, self._shared(tensor), tensor)
        for i, ((_, _, split), part) in enumerate(zip(self._places, parts, strict=True)):
            if split is None or not split.gathers(tensor.size):
                yield part if split is None else _joined([part], split)
                continue
            stored = part.split([s.rows // tensor.size for s in split.segments], dim=0)
            pieces: list[Tensor] = []
            for j, segment in enumerate(split.segments):
                if (i, j) in gathered:
                    whole = gathered[i, j]
                    pieces += [whole.narrow(0, *rows) for rows in _taken(segment, split, tensor)]
                else:
                    pieces.append(stored[j])
                if split.once and tensor.rank:
                    pieces[-1] = pieces[-1] * 0.0
            yield _joined(pieces, split)

    def gradients(self, of_computed: Sequence[Tensor], tensor: TensorGroup) -> list[Tensor]:
        """Return the gradients of what this process stores from those of what it computed with.

        Those of shared segments are added over the processes, in one collective for each dtype.
        """
        wholes: dict[tuple[int, int], Tensor] = {}
        owned: dict[tuple[int, int], Tensor] = {}
        shared = set(self._shared(tensor))
        for i, ((_, _, split), gradient) in enumerate(zip(self._places, of_computed, strict=True)):
            if split is None or not split.gathers(tensor.size):
                continue
            begin = 0
            for j, segment in enumerate(split.segments):
                if (i, j) not in shared:
                    rows = segment.rows // tensor.size
                    owned[i, j] = gradient.narrow(0, begin, rows)
                    begin += rows
                    continue
                whole = gradient.new_zeros(segment.rows, *gradient.shape[1:])
                for start, rows in _taken(segment, split, tensor):
                    if not (split.once and tensor.rank):
                        whole.narrow(0, start, rows).add_(gradient.narrow(0, begin, rows))
                    begin += rows
                wholes[i, j] = whole
        for dtype in dict.fromkeys(whole.dtype for whole in wholes.values()):
            same = {k: whole for k, whole in wholes.items() if whole.dtype == dtype}
            # One row a process.
            flat = torch.cat([whole.reshape(tensor.size, -1) for whole in same.values()], dim=1)
            mine = reduce_scatter(flat, 0, tensor.group).squeeze(0)
            parts = mine.split([whole.numel() // tensor.size for whole in same.values()])
            for (place, whole), part in zip(same.items(), parts, strict=True):
                owned[place] = part.view(-1, *whole.shape[1:])
        found = []
        for i, ((_, _, split), gradient) in enumerate(zip(self._places, of_computed, strict=True)):
            if split is None:
                found.append(gradient)
            elif split.gathers(tensor.size):
                found.append(torch.cat([owned[i, j] for j in range(len(split.segments))]))
            elif split.dim == 0:  # perhaps with padding
                rows = sum(segment.rows // tensor.size for segment in split.segments)
                found.append(gradient.narrow(0, 0, rows))
            else:
                found.append(gradient)
        return found

    def _shared(self, tensor: TensorGroup) -> list[tuple[int, int]]:
        """Return (parameter, segment) of what all processes gather."""
        return [
            (i, j)
            for i, (_, _, split) in enumerate(self._places)
            if split is not None and split.gathers(tensor.size)
            for j, segment in enumerate(split.segments)
            if split.once or not segment.divides(tensor.size)
        ]

    def _gather(
        self, parts: list[Tensor], shared: list[tuple[int, int]], tensor: TensorGroup
    ) -> dict[tuple[int, int], Tensor]:
        """Gather the shared segments of all weights of one dtype in one collective."""
        pieces: dict[tuple[int, int], Tensor] = {}
        for i, j in shared:
            split = self._places[i][2]
            assert split is not None
            assert split.dim == 0, "only rows are gathered"
            sizes = [segment.rows // tensor.size for segment in split.segments]
            pieces[i, j] = parts[i].split(sizes, dim=0)[j]
        gathered: dict[tuple[int, int], Tensor] = {}
        for dtype in dict.fromkeys(piece.dtype for piece in pieces.values()):
            same = {k: piece for k, piece in pieces.items() if piece.dtype == dtype}
            flat = torch.cat([piece.reshape(-1) for piece in same.values()])
            # One row a process.
            whole = gather_for_parts(flat.unsqueeze(0), 0, tensor.group)
            columns = whole.split([piece.numel() for piece in same.values()], dim=1)
            for (place, piece), column in zip(same.items(), columns, strict=True):
                gathered[place] = column.reshape(-1, *piece.shape[1:])
        return gathered


class _Local(torch.autograd.Function):
    """What is computed with, as one node: for a small layer, the host's time is in its nodes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weights: DistributedWeights, tensor: TensorGroup, *stored: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.tensor, ctx.stored = weights, tensor, stored
        parts = [p._local_tensor if isinstance(p, DTensor) else p for p in stored]
        return tuple(part.detach() for part in weights.computed(parts, tensor))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        found = ctx.weights.gradients(gradients, ctx.tensor)
        # The gradient of a replicated weight is the same everywhere; or, where each process uses it
        # on its own part of the sequence, a part of a sum that is made once a step, not here.
        return None, None, *(
            DTensor.from_local(
                gradient.contiguous(), parameter.device_mesh, parameter.placements,
                run_check=False, shape=parameter.shape, stride=parameter.stride(),
            )
            if isinstance(parameter, DTensor) else gradient
            for gradient, parameter in zip(found, ctx.stored, strict=True)
        )  # fmt: skip


def _to_local(stored: Tensor, split: Split | None) -> Tensor:
    if not isinstance(stored, DTensor):
        return stored
    # The gradient of a replicated weight is the same everywhere; or, where each process uses it on
    # its own part of the sequence, a part of a sum that is made once a step, not here.
    placement: Placement = Replicate() if split is None else Shard(split.dim)
    return stored.to_local(grad_placements=[placement])


def _joined(pieces: list[Tensor], split: Split) -> Tensor:
    rows = sum(piece.shape[0] for piece in pieces)
    if split.pad_rows and rows % split.pad_rows:
        missing = split.pad_rows - rows % split.pad_rows
        pieces = [*pieces, pieces[0].new_zeros(missing, *pieces[0].shape[1:])]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=0)


def _taken(segment: Segment, split: Split, tensor: TensorGroup) -> list[tuple[int, int]]:
    """Return (start, rows) of this process's units in a whole segment, which all have gathered.

    Slices, not an index: a tensor of numbers would have to be sent to the device and waited for.
    """
    if split.once:
        return [(0, segment.rows)]
    width = segment.width
    return [(unit * width, width) for unit in segment.units_of(tensor.rank, tensor.size)]
