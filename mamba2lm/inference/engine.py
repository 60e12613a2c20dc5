"""Generation: prompts become states by the parallel form, then each step costs one token.

A prompt of any length is read in chunks through ``LanguageModel.forward``; what is left of it is a
state whose size does not depend on its length (attention apart). From there ``LanguageModel.step``
feeds one token a row. Nothing is ever padded: rows of unequal prompts are prefilled apart and
joined as states, and a row that ends leaves the batch.

Axes: b batch row, l length, v vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.inference.decoding import Completion, Decoding, Row, completion
from mamba2lm.inference.sampling import Sampler, SamplingConfig
from mamba2lm.inference.session import Session
from mamba2lm.models import LanguageModel, ModelState
from mamba2lm.schema import ConfigError


class Engine:
    """Run a model: prefill, generate, stream."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, prefill_chunk: int = 2048
    ) -> None:
        """Bind a model to its tokenizer.

        Args:
            model: On the device it shall run on.
            tokenizer: The one it was trained with.
            prefill_chunk: Prompt tokens read at once; bounds memory, never changes the result.
        """
        if prefill_chunk < 1:
            raise ConfigError("prefill_chunk", prefill_chunk, "must be ≥ 1.")
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return a prompt's ids as the model reads the beginning of a document."""
        return [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]

    @torch.inference_mode()
    def prefill(
        self, ids: Sequence[Sequence[int]], state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Read each row's tokens by the parallel form.

        Rows of one length are read together, the groups joined as states; equal prompts that begin
        from nothing are read once.

        Args:
            ids: One list of token ids a row, each with at least one.
            state: What each row has read before, not changed; None for nothing.

        Returns:
            Logits of each row's next token (b, v), float32 at least, and the state after its last.

        Raises:
            ValueError: No rows, or a row without tokens.
        """
        if not ids or not all(ids):
            raise ValueError(f"ids has rows of {[len(row) for row in ids]} tokens; expected ≥ 1.")
        if state is None:
            distinct = list(dict.fromkeys(tuple(row) for row in ids))
            if len(distinct) < len(ids):
                place = {row: i for i, row in enumerate(distinct)}
                logits_bv, joined = self.prefill(distinct)
                copies = [place[tuple(row)] for row in ids]
                return logits_bv[copies], joined.rows(copies)
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            groups.setdefault(len(row), []).append(i)
        logits, states = [], []
        for members in groups.values():
            before = None if state is None else state.rows(members)
            group_logits, after = self._read([ids[i] for i in members], before)
            logits.append(group_logits)
            states.append(after)
        if len(groups) == 1:
            return logits[0], states[0]
        order = [i for members in groups.values() for i in members]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(logits)[back], ModelState.concat(states).rows(back)

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int,
        seeds: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continue several prompts as one batch.

        Args:
            prompts: Texts; an empty one lets the model begin a document.
            sampling: Defaults where None.
            max_new_tokens: Most tokens a text.
            seeds: One a prompt, or the first one's, counted up. A text depends on its own prompt
                and seed only, not on the others.

        Returns:
            One completion a prompt, in their order.

        Raises:
            ConfigError: Sampling values out of range, or a negative ``max_new_tokens``.
        """
        sampling = self.checked(sampling, max_new_tokens)
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(prompts))
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds has {len(seeds)} entries; expected {len(prompts)}, one a row.")
        if not prompts:
            return []
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        rows = [
            Row(self.tokenizer, sampling, max_new_tokens=max_new_tokens, seed=seed, seen=row_ids)
            for row_ids, seed in zip(ids, seeds, strict=True)
        ]
        began = self.clock()
        logits_bv, state = self.prefill(ids)
        prefilled = self.clock()
        decoding = Decoding(self.model, Sampler(sampling), rows, logits_bv, state)
        while decoding:
            decoding.advance()
        return [
            completion(row, len(row_ids), began, prefilled)
            for row, row_ids in zip(rows, ids, strict=True)
        ]

    def stream(
        self,
        prompt: str,
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue one prompt, giving each piece of text as soon as it is certain.

        No piece ends within a character, and text that may begin a stop string is held back until
        it is known not to. The pieces joined are the text that ``generate`` gives.
        """
        return Session(self).stream(prompt, sampling, max_new_tokens=max_new_tokens, seed=seed)

    def checked(self, sampling: SamplingConfig | None, max_new_tokens: int) -> SamplingConfig:
        """Return the sampling to use, after checking it.

        Raises:
            ConfigError: Sampling values out of range, or a negative ``max_new_tokens``.
        """
        if max_new_tokens < 0:
            raise ConfigError("max_new_tokens", max_new_tokens, "must be ≥ 0.")
        sampling = SamplingConfig() if sampling is None else sampling
        sampling.validate()
        return sampling

    def clock(self) -> float:
        """Return the time in seconds once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _read(
        self, ids: Sequence[Sequence[int]], state: ModelState | None
    ) -> tuple[Tensor, ModelState]:
        ids_bl = torch.tensor(ids, dtype=torch.int64, device=self.device)
        state = self.model.new_state(len(ids)) if state is None else state
        logits_b1v: Tensor | None = None
        for chunk_bl in ids_bl.split(self.prefill_chunk, dim=1):
            output = self.model(chunk_bl, state=state, last_only=True)
            logits_b1v, state = output.logits, output.state
        assert logits_b1v is not None
        assert state is not None
        return logits_b1v[:, 0], state
