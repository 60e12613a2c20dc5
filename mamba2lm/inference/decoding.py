"""One text being generated: what of it is certain, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mamba2lm.data.tokenizer import Tokenizer

FinishReason = Literal["length", "stop", "eos", "interrupted"]


@dataclass
class TokenLogprob:
    """A token's log-probability by the model alone, before any penalty or temperature, in nats."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most likely tokens at this place and their log-probabilities, the likeliest first."""


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
    """From when the request was first read to its first token."""
    decode_seconds: float
    """Time from there to this text's last token."""
    cached_tokens: int = 0
    """Of the prompt, those whose state was found in the state cache."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of ``token_ids``, where they were asked for."""


class Row:
    """One text being generated: its tokens, and what of it is certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
        grows: bool = True,
    ) -> None:
        """Start a text.

        Args:
            tokenizer: For its incremental decoder and its end-of-text id.
            max_new_tokens: Most tokens to draw.
            stop: Strings that the text ends before.
            stop_token_ids: Ids that end it, beside the end-of-text id.
            ignore_eos: Go on after the end-of-text id, as if it were any other.
            grows: Whether somebody reads the text before its end. Else tokens become text then
                only, unless that takes long or there are stop strings to look for.
        """
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.told = 0
        """Tokens that ``news`` has given."""
        self._told_text = 0
        self.finish_reason: FinishReason | None = None
        self.finished_at = 0.0
        self.ended_by: int | None = None
        """The id that ended the text, if one did; it is not among ``token_ids``."""
        self._ends = set(stop_token_ids) | (set() if ignore_eos else {tokenizer.eos_id})
        self._eos_id = tokenizer.eos_id
        self._max_new_tokens = max_new_tokens
        self._stop = StopStrings(stop)
        self._decoder = tokenizer.stream()
        # What takes its time is not left to the end, where all rows would wait for it.
        self._grows = grows or not self._decoder.quick

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self._max_new_tokens - len(self.token_ids)

    def extend(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None = None
    ) -> str:
        """Take tokens drawn one after the other, up to the one that ends the text.

        Args:
            token_ids: At least one.
            logprobs: Theirs, where they are reported.

        Returns:
            The text that has become certain.
        """
        assert self.finish_reason is None
        token_ids = token_ids[: self.left]
        ended_by: int | None = None
        if not self._ends.isdisjoint(token_ids):
            end = next(i for i, token_id in enumerate(token_ids) if token_id in self._ends)
            token_ids, ended_by = token_ids[:end], token_ids[end]
        text = ""
        if self._stop.looks:
            # A stop string may end with any of them, and what follows is no part of the text.
            for place, token_id in enumerate(token_ids):
                text += self._stop.push(self._decoder.push(token_id))
                if self._stop.found:
                    token_ids = token_ids[: place + 1]
                    break
        elif self._grows:
            text = self._decoder.extend(token_ids)
        self.token_ids += token_ids
        if logprobs is not None:
            self.logprobs += logprobs[: len(token_ids)]
        self.text += text
        if self._stop.found:
            self.finish_reason, self.finished_at = "stop", time.perf_counter()
        elif ended_by is not None:
            self.ended_by = ended_by
            text += self.finish("eos" if ended_by == self._eos_id else "stop")
        elif not self.left:
            text += self.finish("length")
        return text

    def news(self) -> tuple[str, int, list[TokenLogprob]]:
        """Return text, number of tokens, and their log-probabilities, since the last call."""
        text, tokens = self.text[self._told_text :], len(self.token_ids) - self.told
        logprobs = self.logprobs[self.told :]
        self._told_text, self.told = len(self.text), len(self.token_ids)
        return text, tokens, logprobs

    def finish(self, reason: FinishReason) -> str:
        """End the text; return what was held back of it."""
        text = ""
        if not (self._grows or self._stop.looks):
            text = self._decoder.extend(self.token_ids)
        text += self._stop.push(self._decoder.flush())
        text += self._stop.flush()
        self.finish_reason = "stop" if self._stop.found else reason
        self.finished_at = time.perf_counter()
        self.text += text
        return text


class StopStrings:
    """Cut a growing text before the first stop string, however its pieces fall."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self.looks = bool(stops)
        """Whether there is any."""
        self._stops = list(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece; return what cannot be part of a stop string."""
        if self.found:
            return ""
        if not self._stops:
            return piece
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
