"""What is being generated: rows that draw tokens together until each ends in its own way.

Axes: b batch row, v vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.inference.sampling import Sampler, SamplingConfig
from mamba2lm.models import LanguageModel, ModelState

FinishReason = Literal["length", "stop", "eos", "interrupted"]


@dataclass
class Completion:
    """A generated text."""

    text: str
    """The continuation alone, up to the stop string if there was one."""
    token_ids: list[int]
    """The ids drawn, those of a stop string included, the end-of-text id not."""
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    """Time until the whole batch's prompts were states."""
    decode_seconds: float
    """Time from there to this text's last token."""


class Row:
    """One text being generated: its random numbers, its tokens, and what of it is certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        max_new_tokens: int,
        seed: int,
        seen: Collection[int] = (),
    ) -> None:
        """Start a text.

        Args:
            tokenizer: For its incremental decoder and its end-of-text id.
            sampling: For its stop strings.
            max_new_tokens: Most tokens to draw.
            seed: Of this row's random numbers.
            seen: Ids that the repetition penalty applies to from the start.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self.token_ids: list[int] = []
        self.seen = set(seen) - {tokenizer.eos_id}
        self.text = ""
        self.finish_reason: FinishReason | None = None if max_new_tokens else "length"
        self.finished_at = 0.0
        self._eos_id = tokenizer.eos_id
        self._max_new_tokens = max_new_tokens
        self._stop = StopStrings(sampling.stop)
        self._decoder = tokenizer.stream()

    def push(self, token_id: int) -> str:
        """Take a drawn token; return the text that has become certain."""
        assert self.finish_reason is None
        if token_id == self._eos_id:
            return self.finish("eos")
        self.token_ids.append(token_id)
        self.seen.add(token_id)
        text = self._give(self._stop.push(self._decoder.push(token_id)))
        if self._stop.found:
            self.finish_reason, self.finished_at = "stop", time.perf_counter()
        elif len(self.token_ids) == self._max_new_tokens:
            text += self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """End the text; return what was held back of it."""
        text = self._stop.push(self._decoder.flush())
        text += self._stop.flush()
        self.finish_reason = "stop" if self._stop.found else reason
        self.finished_at = time.perf_counter()
        return self._give(text)

    def _give(self, text: str) -> str:
        self.text += text
        return text


class StopStrings:
    """Cut a growing text before the first stop string, however its pieces fall."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = list(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece; return what cannot be part of a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        # The stop string that is complete first ends the text, as if it came by single characters.
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Decoding:
    """Rows that are generated together, their state, and the logits of their next tokens."""

    def __init__(
        self,
        model: LanguageModel,
        sampler: Sampler,
        rows: Sequence[Row],
        logits_bv: Tensor,
        state: ModelState,
    ) -> None:
        """Take over prefilled rows; ``state`` is overwritten from here on."""
        self.state = state
        """Has read every token of its rows but the one drawn last."""
        self._model = model
        self._sampler = sampler
        self._rows = list(rows)
        self._logits_bv = logits_bv
        self._drawn_b: Tensor | None = None
        self._drop_finished()

    def __bool__(self) -> bool:
        return any(row.finish_reason is None for row in self._rows)

    @torch.inference_mode()
    def advance(self) -> list[tuple[Row, str]]:
        """Draw one token for each row; return the rows with the text that became certain."""
        if self._drawn_b is not None:
            self._drop_finished()
            self._logits_bv, self.state = self._model.step(self._drawn_b, self.state)
        self._drawn_b = self._sampler(
            self._logits_bv,
            [row.seen for row in self._rows],
            [row.generator for row in self._rows],
        )
        return [
            (row, row.push(token_id))
            for row, token_id in zip(self._rows, self._drawn_b.tolist(), strict=True)
        ]

    def _drop_finished(self) -> None:
        kept = [i for i, row in enumerate(self._rows) if row.finish_reason is None]
        if kept and len(kept) < len(self._rows):
            self._rows = [self._rows[i] for i in kept]
            self.state = self.state.rows(kept)
            index = torch.tensor(kept, device=self._logits_bv.device)
            self._logits_bv = self._logits_bv.index_select(0, index)
            if self._drawn_b is not None:
                self._drawn_b = self._drawn_b.index_select(0, index)


def completion(row: Row, prompt_tokens: int, began: float, prefilled: float) -> Completion:
    """Return what a finished row has to show."""
    assert row.finish_reason is not None
    return Completion(
        text=row.text,
        token_ids=list(row.token_ids),
        finish_reason=row.finish_reason,
        prompt_tokens=prompt_tokens,
        prefill_seconds=prefilled - began,
        decode_seconds=max(row.finished_at - prefilled, 0.0),
    )
