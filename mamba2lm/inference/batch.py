"""The running batch: rows that decode together, joined and left between steps.

Axes: b batch row, t step, v vocabulary, w alternatives.

Rows lie side by side in buffers that stay where they are: a row that joins is copied behind the
last one, and when one leaves the last takes its place. A step runs over views of the first rows, a
few more than there are where that keeps the number of shapes small; what the spare rows compute is
never read. On a GPU a step and its draw are recorded once per shape as a CUDA graph and replayed,
so a token costs one launch; tokens stay on the device until a whole stride of them is fetched.

Attention's caches are buffers of equal slots for all rows, sliced to a power of two that holds the
longest row, so a step reads no more than twice what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba2lm.inference.decoding import TokenLogprob
from mamba2lm.inference.graphs import Graphs
from mamba2lm.inference.rows import Read, Rows
from mamba2lm.inference.sampling import Drawn, Features, SamplingConfig, SamplingRows, draw
from mamba2lm.inference.structured import Constraint
from mamba2lm.models import LanguageModel, ModelState

# From four rows on, MKL's float32 products give a row the same bits however many rows there are;
# with fewer it takes other routines. So a batch never changes what a row draws on a CPU.
_FEWEST_CPU_ROWS = 4
_FEWEST_SLOTS = 64
_INITIAL_ROWS = 8
# Caches of more slots than this are given back when the last row leaves.
_KEPT_SLOTS = 8192


@dataclass(eq=False)
class Slot:
    """What the host knows of a running row."""

    owner: Any
    """Whom its tokens are for; never looked into here."""
    tokens: int
    """Tokens that its state has read."""
    left: int
    """Tokens that may still be drawn; what is drawn beyond is of no use."""
    sampling: SamplingConfig
    seed: int
    seen: Collection[int]
    """Ids that the repetition penalty applies to from the start."""
    logprobs: int | None
    """Alternatives to report beside a token, 0 for the token alone, None for nothing."""
    constraint: Constraint | None = None
    """What the row's text must follow."""


@dataclass
class DrawnTokens:
    """What one row has drawn, as the host sees it."""

    token_ids: list[int]
    """One a step; −1 where the model's output is not finite."""
    logprobs: list[TokenLogprob] | None


class Flight:
    """What one or more steps have drawn, on its way to the host."""

    def __init__(
        self,
        drawn: Sequence[Drawn],
        slots: Sequence[Slot],
        began: float | torch.cuda.Event | None = None,
    ) -> None:
        """Begin to fetch it, without waiting for it.

        Args:
            drawn: Of each step.
            slots: The rows that it was drawn for.
            began: When the first step did, as ``_now`` told it; None where it was no step.
        """
        self.slots = list(slots)
        self.steps = len(drawn)
        self._began = began
        self._ended_at = time.perf_counter()
        self._fetched = [self._fetch(tensors) for tensors in zip(*drawn, strict=True)]
        self._arrived: float | torch.cuda.Event | None = None
        if drawn[0].token_b.is_cuda:
            self._arrived = _now(drawn[0].token_b.device)

    def _fetch(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        real = [tensor for tensor in tensors if tensor is not None]
        if not real:
            return None
        stacked = torch.stack(real)
        if not stacked.is_cuda:
            return stacked
        host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
        return host.copy_(stacked, non_blocking=True)

    def wait(self) -> None:
        """Wait for it."""
        if isinstance(self._arrived, torch.cuda.Event):
            self._arrived.synchronize()

    def step_seconds(self) -> float | None:
        """Return how long the device took a step, once waited for; None where it was no step."""
        if isinstance(self._began, torch.cuda.Event):
            assert isinstance(self._arrived, torch.cuda.Event)
            return self._began.elapsed_time(self._arrived) / 1e3 / self.steps
        return None if self._began is None else (self._ended_at - self._began) / self.steps

    def tokens(self) -> list[DrawnTokens]:
        """Wait for it; return one after the other what each row has drawn."""
        self.wait()
        token_bt, logprob_bt, top_btw, top_token_btw = (
            [] if tensor is None else tensor.transpose(0, 1).tolist() for tensor in self._fetched
        )
        # Steps run over a few more rows than there are.
        drawn = [DrawnTokens(token_t, None) for token_t in token_bt[: len(self.slots)]]
        for i, (slot, row) in enumerate(zip(self.slots, drawn, strict=True)):
            if slot.logprobs is None:
                continue
            row.logprobs = []
            for t, token_id in enumerate(row.token_ids):
                top = []
                if slot.logprobs:
                    pairs = zip(top_token_btw[i][t], top_btw[i][t], strict=True)
                    top = list(pairs)[: slot.logprobs]
                row.logprobs.append(TokenLogprob(token_id, logprob_bt[i][t], top))
        return drawn


class Batch:
    """Rows that decode together."""

    def __init__(
        self,
        model: LanguageModel,
        max_rows: int,
        *,
        recurrent_dtype: torch.dtype | None = None,
        graphs: bool = True,
        masks: Callable[[Sequence[Constraint]], Tensor] | None = None,
    ) -> None:
        """Make room for nothing yet.

        Args:
            model: On the device it shall run on.
            max_rows: Most rows at once.
            recurrent_dtype: Of recurrent states while they decode; default the model's own.
            graphs: Replay steps as CUDA graphs where the device has them.
            masks: Tells what constraints allow next, where rows have any.
        """
        self._masks = masks
        self.slots: list[Slot] = []
        self._model = model
        self._device = model.embedding.weight.device
        self._max_rows = max_rows
        self._recurrent_dtype = recurrent_dtype
        self.grows = any(not block.mixer.constant_state for block in model.blocks)
        """Whether a row takes more memory with every token."""
        self._capacity = self._room = 0
        self._states = self._no_states()
        self._rows = SamplingRows.new(0, self._device)
        self._token_b = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._needs: Features | None = None  # of all rows, while these are the rows
        self._graphs: Graphs[Drawn] | None = None
        if graphs and self._device.type == "cuda":
            self._graphs = Graphs("a step")

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def constrained(self) -> bool:
        """Whether any row must follow something."""
        return any(slot.constraint is not None for slot in self.slots)

    @property
    def step_rows(self) -> list[int]:
        """All numbers of rows that a step may run over, once there is room for the most."""
        return sorted({self._bucket(rows, self._max_rows) for rows in range(1, self._max_rows + 1)})

    @property
    def nbytes(self) -> int:
        """Bytes of the state buffers."""
        return self._states.nbytes

    @torch.inference_mode()
    def join(self, slots: Sequence[Slot], states: Sequence[Read], logits_bv: Tensor) -> Flight:
        """Add rows and draw the first token of each.

        Args:
            slots: What is known of each.
            states: The state of each after its prompt; copied.
            logits_bv: Of each row's first token.
        """
        old, new = len(self), len(self) + len(slots)
        assert new <= self._max_rows
        self._make_room(new, max(slot.tokens for slot in slots))
        if any(slot.sampling.penalises for slot in slots) and self._rows.counts_bv is None:
            self._rows.track(self._model.vocab_size)
            self._forget_graphs()
        if any(slot.constraint for slot in slots) and self._rows.mask_bw is None:
            self._rows.track_masks(self._model.vocab_size)
            self._forget_graphs()
        self._states.put(old, states)
        self._rows.put(old, [(slot.sampling, slot.seed, slot.seen) for slot in slots])
        self._allow(slots, old)
        features = self._features(slots)
        drawn = draw(logits_bv, self._rows.rows(old, new), features)
        self._token_b[old:new] = drawn.token_b
        self.slots += slots
        self._needs = None
        for slot in slots:
            slot.left -= 1
        return Flight([drawn], slots)

    @torch.inference_mode()
    def reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens in every row, or leave all as it is and raise."""
        self._make_room(len(self), max(slot.tokens for slot in self.slots) + count)

    @torch.inference_mode()
    def launch(self, count: int = 1) -> Flight:
        """Feed each row its last token and draw the next, ``count`` times.

        With constraints once: they have to hear of every token before the next is drawn.

        A GPU is told what to do and not waited for; what is asked of the batch meanwhile takes
        place after it.
        """
        assert count == 1 or not self.constrained
        self.reserve(count)
        self._allow(self.slots, 0)
        tokens = max(slot.tokens for slot in self.slots) + count
        features = self._needs = self._needs or self._features(self.slots)
        rows = self._bucket(len(self), self._capacity)
        slots = _slots_for(tokens) if self.grows else 0
        once = self._once(rows, slots, features)
        if self._graphs is not None:
            scratch = self._once(rows, slots, features, scratch=True)
            once = self._graphs.recorded((rows, slots, features), once, scratch)
        drawn = []
        began = _now(self._device)
        for _ in range(count):
            result = once()
            drawn.append(Drawn(*(None if t is None else t.clone() for t in result)))  # type: ignore[arg-type]
        for slot in self.slots:
            slot.tokens += count
            slot.left -= count
        return Flight(drawn, self.slots, began)

    @torch.inference_mode()
    def state_of(self, index: int) -> ModelState:
        """Return a copy of one row's state, which has read all but the token drawn last."""
        state = self._states.taken(index, self.slots[index].tokens)
        if self._recurrent_dtype is None:
            return state
        like = self._model.new_state(0)
        return ModelState(
            [
                mine.replace(**{name: mine[name].to(theirs[name].dtype) for name in mine})
                for mine, theirs in zip(state.layers, like.layers, strict=True)
            ]
        )

    @torch.inference_mode()
    def leave(self, indices: Collection[int]) -> None:
        """Remove rows; the last ones take their places."""
        self._needs = None
        for index in sorted(indices, reverse=True):
            last = len(self) - 1
            if index < last:
                self._states.move(last, index, self.slots[last].tokens)
                self._rows.move(last, index)
                self._token_b[index].copy_(self._token_b[last])
                self.slots[index] = self.slots[last]
            self.slots.pop()
        if not self.slots and self._room > _KEPT_SLOTS:
            self.clear()

    def clear(self) -> None:
        """Forget all rows and give the memory back."""
        self.slots.clear()
        self._forget_graphs()
        self._capacity = self._room = 0
        self._states = self._no_states()
        self._rows = SamplingRows.new(0, self._device)
        self._token_b = self._token_b[:0].clone()

    def _no_states(self) -> Rows:
        return Rows.like(self._model.new_state(0, recurrent_dtype=self._recurrent_dtype), 0)

    def _once(
        self, rows: int, slots: int, features: Features, *, scratch: bool = False
    ) -> Callable[[], Drawn]:
        """Return a step over the first rows; a scratch one leaves every row as it was."""

        def run() -> Drawn:
            state, settings, token_b = (
                self._states.state.first(rows, slots),
                self._rows.rows(0, rows),
                self._token_b[:rows],
            )
            if scratch:
                state, settings, token_b = state.clone(), settings.clone(), token_b.clone()
            # A row whose last draw failed is about to be removed.
            logits_bv, stepped = self._model.step(token_b.clamp(min=0), ModelState(state.layers))
            state.keep(stepped)
            drawn = draw(logits_bv, settings, features)
            token_b.copy_(drawn.token_b)
            return drawn

        return run

    def _allow(self, slots: Sequence[Slot], first: int) -> None:
        """Tell the draw what the constraints of these slots, from row ``first`` on, allow next."""
        pairs = [
            (i, slot.constraint)
            for i, slot in enumerate(slots, first)
            if slot.constraint is not None
        ]
        if pairs:
            assert self._masks is not None
            indices, constraints = zip(*pairs, strict=True)
            self._rows.allow(indices, self._masks(constraints))

    def _features(self, slots: Sequence[Slot]) -> Features:
        return Features.of(
            [slot.sampling for slot in slots],
            [slot.logprobs for slot in slots],
            self._model.vocab_size,
        )

    def _bucket(self, rows: int, capacity: int) -> int:
        """Return how many of so many rows a step runs over, so that there are few shapes."""
        if self._graphs is not None:
            bucket = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
        elif self._device.type == "cpu" and self._max_rows > 1:
            bucket = max(rows, _FEWEST_CPU_ROWS)
        else:
            bucket = rows
        return min(bucket, capacity)

    def _make_room(self, rows: int, tokens: int) -> None:
        """Let the buffers hold so many rows of so many tokens; they at least double."""
        if rows > self._capacity:
            most = self._max_rows
            if self._max_rows > 1:
                rows, most = max(rows, _INITIAL_ROWS), max(most, _FEWEST_CPU_ROWS)
            capacity = min(max(rows, 2 * self._capacity), most)
            states = self._states.grown(capacity)
            token_b = self._token_b.new_zeros(capacity)
            token_b[: self._capacity] = self._token_b
            # All of it or, where memory runs out, nothing.
            self._rows = self._rows.grown(capacity)
            self._states, self._token_b, self._capacity = states, token_b, capacity
            self._forget_graphs()
        if self.grows and tokens > self._room:
            self._states = self._states.reserved(self._model, _slots_for(tokens))
            self._room = _slots_for(tokens)
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Drop the recorded steps: they write to buffers that are no more."""
        if self._graphs is not None:
            self._graphs = Graphs("a step")


def _now(device: torch.device) -> float | torch.cuda.Event:
    """Return the time; of a GPU, when it has done all that it has been told so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _slots_for(tokens: int) -> int:
    """Return the power of two of cache slots that holds so many tokens."""
    return max(_FEWEST_SLOTS, 1 << (tokens - 1).bit_length())
