"""Whole new prompts read together in a few shapes, which a GPU records.

Axes: b batch row, l length, v vocabulary.

Launched one by one, the kernels that read a prompt of some hundred tokens take the host longer than
they take the GPU. In a recorded graph they are one launch. A graph has one shape; so numbers of
rows and lengths are rounded up, and what is shorter stands at the end of its row, behind a document
that the model forgets where the prompt begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba2lm.inference.graphs import Graphs
from mamba2lm.inference.rows import Rows
from mamba2lm.inference.sampling import sent
from mamba2lm.models import LanguageModel, ModelState

log = logging.getLogger(__name__)

_SHORTEST = 64
_MOST_ROWS = 8


class WholePrompts:
    """Reads prompts from their beginnings to their ends."""

    def __init__(self, model: LanguageModel, *, most: int, record: bool) -> None:
        """Take no memory yet.

        Args:
            model: Whose state forgets what stands before a prompt, as attention's caches do not.
            most: Most tokens of a pass.
            record: Whether passes are recorded as CUDA graphs.
        """
        self._model = model
        self._device = model.embedding.weight.device
        self._most = most
        self._lengths = [1 << n for n in range(_SHORTEST.bit_length() - 1, most.bit_length())]
        self._graphs: Graphs[Tensor] | None = Graphs("a pass over prompts") if record else None
        self._passes: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._out: dict[int, Rows] = {}
        self._before: ModelState | None = None
        self._given = torch.zeros(0, dtype=torch.int64, device=self._device)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All rows and lengths of passes, the largest first."""
        rows = [1 << n for n in range(_MOST_ROWS.bit_length())]
        fit = [(b, n) for b in rows for n in self._lengths if b * n <= self._most]
        return sorted(fit, key=lambda shape: -shape[0] * shape[1])

    def shape(self, rows: int, longest: int) -> tuple[int, int] | None:
        """Return the rows and the length of the pass that reads so many prompts; None: no pass."""
        count = 1 << (rows - 1).bit_length()
        length = next((length for length in self._lengths if length >= longest), None)
        if length is None or count > _MOST_ROWS or count * length > self._most:
            return None
        return count, length

    @torch.inference_mode()
    def record(self) -> None:
        """Record all shapes, where passes are recorded at all and memory suffices."""
        if self._graphs is None:
            return
        try:
            self._make_room()
        except torch.OutOfMemoryError as error:
            log.warning("there is no memory to read whole prompts together in: %s", error)
            return
        for shape in self.shapes:
            self._recorded(self._graphs, shape)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Rows, Tensor]:
        """Read prompts, for which ``shape`` has a pass.

        Returns:
            Their states, and the logits of the next token of each, (b, v).
        """
        shape = self.shape(len(prompts), max(map(len, prompts)))
        assert shape is not None
        rows, length = shape
        missing = [length - len(prompt) for prompt in prompts] + [0] * (rows - len(prompts))
        numbers = [*missing]
        for prompt in prompts:
            numbers += [0] * (length - len(prompt))
            numbers += prompt
        numbers += [0] * (length * (rows - len(prompts)))
        self._make_room()
        self._given[: len(numbers)] = sent(numbers, torch.int64, self._device)
        # A shape that is met only once is not worth recording.
        if self._graphs is not None and shape in self._passes:
            logits_bv = self._recorded(self._graphs, shape)()
        else:
            logits_bv = self._pass(shape)()
        # Copies: the next pass writes there again.
        return self._out[rows].first(len(prompts)), logits_bv[: len(prompts)].clone()

    def _recorded(self, graphs: Graphs[Tensor], shape: tuple[int, int]) -> Callable[[], Tensor]:
        self._make_room()
        once = self._pass(shape)
        return graphs.recorded(shape, once, once)

    def _make_room(self) -> None:
        """Allocate what all passes share: what they are given, and where they leave states."""
        if self._out:
            return
        most = min(_MOST_ROWS, self._most // _SHORTEST)
        rows = Rows.like(self._model.new_state(0), most)
        self._given = self._given.new_zeros(self._most + _MOST_ROWS)
        self._before = self._nothing_before(most)
        counts = [1 << n for n in range(most.bit_length())]
        self._out = {count: rows.resized(count) for count in counts}

    def _nothing_before(self, rows: int) -> ModelState:
        """Return the state before any token; layers share memory, which nobody writes to."""
        zeros: dict[tuple[object, ...], Tensor] = {}
        layers = []
        for layer in self._model.new_state(0).layers:
            mine = {}
            for name in layer:
                tensor = layer[name]
                kind = tensor.dtype, tensor.shape[1:]
                if kind not in zeros:
                    zeros[kind] = tensor.new_zeros(rows, *tensor.shape[1:])
                mine[name] = zeros[kind]
            layers.append(layer.replace(**mine))
        return ModelState(layers)

    def _pass(self, shape: tuple[int, int]) -> Callable[[], Tensor]:
        """Return a pass over what has been given, which leaves the states in their buffers.

        First in what is given come the places where rows begin, then their ids.
        """
        if shape in self._passes:
            return self._passes[shape]
        rows, length = shape
        begin_b, ids = self._given[:rows], self._given[rows : rows * (length + 1)]
        out = self._out[rows]

        def run() -> Tensor:
            assert self._before is not None
            place_l = torch.arange(length, device=self._device)
            output = self._model(
                ids.view(rows, length),
                seq_idx=(place_l >= begin_b[:, None]).long(),
                state=self._before.first(rows, 0),
                last_only=True,
            )
            assert output.logits is not None
            assert output.state is not None
            out.fill(output.state)
            return output.logits[:, -1]

        self._passes[shape] = run
        return run
