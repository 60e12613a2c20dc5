"""States of many rows, side by side, and how a row comes and goes.

Axes: k tensors of one kind, b batch row.

A model of 64 layers has 128 tensors in its state. Moved one by one, a row costs as many operations
as a step has kernels; so tensors that differ by their layer alone lie in one buffer, and a row is
moved by one operation a kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mamba2lm.layers import State
from mamba2lm.models import LanguageModel, ModelState

# More tokens than any row has read.
_ALL = 1 << 62


@dataclass
class Stack:
    """Tensors that differ by their layer alone."""

    places: list[tuple[int, str]]
    """Layer and name of each."""
    tensor_kb: Tensor
    """(k, b, …)."""


@dataclass(frozen=True)
class Read:
    """What has been read of a prompt: one row of states that several prompts may share."""

    states: ModelState | Rows
    index: int = 0

    def alone(self) -> ModelState:
        """Return it as a state of one row, a copy where it was one of several."""
        if isinstance(self.states, Rows):
            return self.states.taken(self.index, _ALL)
        if all(layer.batch <= 1 for layer in self.states.layers):
            return self.states
        return self.states.row(self.index, _ALL)


class Rows:
    """Buffers of the states of so many rows."""

    def __init__(self, layers: Sequence[State], stacks: Sequence[Stack]) -> None:
        """Bind what ``like`` or a method has made.

        Args:
            layers: Every layer's state; those in stacks count for their kind only.
            stacks: What they hold.
        """
        self._layers = list(layers)
        self._stacks = list(stacks)
        # Caches of attention have rules of their own.
        self._others = [i for i, layer in enumerate(layers) if type(layer) is not State]

    @classmethod
    def like(cls, template: ModelState, rows: int) -> Rows:
        """Return rows that have read nothing, in the shapes and dtypes of another state's."""
        kinds: dict[object, list[tuple[int, str]]] = {}
        layers = list(template.layers)
        for i, layer in enumerate(layers):
            if type(layer) is not State:
                layers[i] = _zeros(layer, rows)
                continue
            for name in layer:
                kind = name, layer[name].dtype, layer[name].shape[1:]
                kinds.setdefault(kind, []).append((i, name))
        stacks = []
        for places in kinds.values():
            layer, name = places[0]
            first = template.layers[layer][name]
            shape = (len(places), rows, *first.shape[1:])
            stacks.append(Stack(places, first.new_zeros(shape)))
        return cls(layers, stacks)

    @cached_property
    def state(self) -> ModelState:
        """All rows, as views."""
        return _with_views(self._layers, self._stacks)

    @property
    def alike(self) -> bool:
        """Whether all of it lies in stacks."""
        return not self._others

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        stacked = sum(s.tensor_kb.numel() * s.tensor_kb.element_size() for s in self._stacks)
        return stacked + sum(self._layers[i].nbytes for i in self._others)

    def grown(self, rows: int) -> Rows:
        """Return the same rows, and after them others that have read nothing, ``rows`` in all."""
        layers = list(self._layers)
        for i in self._others:
            more = _zeros(layers[i], rows - layers[i].batch)
            layers[i] = type(layers[i]).concat([layers[i], more])
        stacks = []
        for stack in self._stacks:
            k, old, *rest = stack.tensor_kb.shape
            tensor_kb = stack.tensor_kb.new_zeros(k, rows, *rest)
            tensor_kb[:, :old] = stack.tensor_kb
            stacks.append(Stack(stack.places, tensor_kb))
        return Rows(layers, stacks)

    def reserved(self, model: LanguageModel, tokens: int) -> Rows:
        """Return the same rows with room for so many tokens in the layers that grow."""
        return Rows(model.reserve(self.state, tokens).layers, self._stacks)

    def first(self, rows: int) -> Rows:
        """Return a copy of the first rows; all must lie in stacks."""
        assert self.alike
        copied = [Stack(s.places, s.tensor_kb[:, :rows].clone()) for s in self._stacks]
        return Rows(self._layers, copied)

    def resized(self, rows: int) -> Rows:
        """Return so many rows, no more than there are, in the beginning of the same memory."""
        assert self.alike
        stacks = []
        for stack in self._stacks:
            k, _, *rest = stack.tensor_kb.shape
            flat = stack.tensor_kb.flatten()[: stack.tensor_kb[:, :rows].numel()]
            stacks.append(Stack(stack.places, flat.view(k, rows, *rest)))
        return Rows(self._layers, stacks)

    def fill(self, state: ModelState) -> None:
        """Overwrite all rows, which must lie in stacks, with a state of as many."""
        assert self.alike
        for stack in self._stacks:
            tensors = [state.layers[layer][name] for layer, name in stack.places]
            torch.stack(tensors, out=stack.tensor_kb)

    def put(self, first: int, reads: Sequence[Read]) -> None:
        """Overwrite rows from ``first`` on, in these rows' dtypes."""
        for place, count in _runs(reads):
            states, index = reads[place].states, reads[place].index
            rows, taken = (slice(start, start + count) for start in (first + place, index))
            for i, stack in enumerate(self._stacks):
                if isinstance(states, Rows):
                    source_kb = states._stacks[i].tensor_kb[:, taken]
                else:
                    parts = [states.layers[layer][name][taken] for layer, name in stack.places]
                    source_kb = torch.stack(parts)
                stack.tensor_kb[:, rows].copy_(source_kb)
        for i in self._others:
            for row, read in enumerate(reads, first):
                states = read.states.state if isinstance(read.states, Rows) else read.states
                layer = states.layers[i]
                alone = layer if layer.batch == 1 else layer.row(read.index, _ALL)
                self._layers[i].put(row, alone)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one row, which has read at most so many tokens, over another."""
        for stack in self._stacks:
            stack.tensor_kb[:, target].copy_(stack.tensor_kb[:, source])
        for i in self._others:
            self._layers[i].put(target, self._layers[i].row(source, tokens))

    def taken(self, row: int, tokens: int) -> ModelState:
        """Return a copy of a row, which has read at most so many tokens."""
        stacks = [Stack(s.places, s.tensor_kb[:, row : row + 1].clone()) for s in self._stacks]
        layers = list(self._layers)
        for i in self._others:
            layers[i] = layers[i].row(row, tokens)
        return _with_views(layers, stacks)


def _runs(reads: Sequence[Read]) -> Iterator[tuple[int, int]]:
    """Yield place and length of what lies side by side where it was read, too."""
    start = 0
    for place in range(1, len(reads) + 1):
        together = (
            place < len(reads)
            and reads[place].states is reads[start].states
            and reads[place].index == reads[start].index + place - start
        )
        if not together:
            yield start, place - start
            start = place


def _zeros(layer: State, rows: int) -> State:
    """Return the state of rows that have read nothing, which is zeros for every mixer."""
    return layer.replace(
        **{name: layer[name].new_zeros(rows, *layer[name].shape[1:]) for name in layer}
    )


def _with_views(layers: Sequence[State], stacks: Sequence[Stack]) -> ModelState:
    """Return the layers' states, with views of the stacks for what lies in them."""
    views: list[dict[str, Tensor]] = [{} for _ in layers]
    for stack in stacks:
        for (layer, name), tensor_b in zip(stack.places, stack.tensor_kb.unbind(), strict=True):
            views[layer][name] = tensor_b
    return ModelState(
        [State(**mine) if mine else layer for layer, mine in zip(layers, views, strict=True)]
    )
