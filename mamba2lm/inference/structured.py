"""Texts that follow a JSON schema, a regular expression or a grammar.

A constraint says which tokens may come next; the draw sees no others. What a text must follow is
read once, by the optional package ``llguidance`` (extra ``structured``), and kept; every row that
asks for it then gets its own place in it.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.inference.sampling import SamplingConfig, mask_words
from mamba2lm.schema import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Constraints read, of which the last used are kept.
_KEPT = 64
# What a constraint may cost, in the package's units: a tenth of its defaults, under which a regular
# expression of a few characters can take half a minute, and other rows wait for a mask.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 20_000,
}


class Constraint:
    """A row's place in what its text must follow."""

    def __init__(self, matcher: LLMatcher, key: str, text: str) -> None:
        """Begin with a matcher of one's own; the config key and its value are for errors."""
        self.matcher = matcher
        self._key = key
        self._text = text

    def take(self, token_id: int) -> bool:
        """Go on by a token; return whether the text is complete and nothing may follow.

        Raises:
            ConfigError: It grew beyond what the package holds.
        """
        self.matcher.consume_token(token_id)
        self.check()
        return self.matcher.is_stopped()

    def check(self) -> None:
        """Refuse to go on where the package could not.

        Raises:
            ConfigError: It grew beyond what the package holds.
        """
        if self.matcher.is_error():
            why = " ".join(self.matcher.get_error().split())[:300]
            raise ConfigError(self._key, self._text[:80], f"cannot be followed: {why}")


class Constraints:
    """What texts of one tokenizer were asked to follow. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read nothing yet.

        Args:
            tokenizer: Whose ids are drawn.
            vocab_size: Width of the logits; ids without a token are never allowed.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._read: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def begin(self, sampling: SamplingConfig) -> Constraint | None:
        """Return the beginning of what a text must follow, None where it is free.

        Raises:
            ConfigError: It cannot be read, or the package is missing.
        """
        wanted = sampling.constraint
        if wanted is None:
            return None
        kind, text = wanted
        with self._lock:
            found = self._read.get(wanted)
        if found is None:
            # A large one takes a while, in which others go on.
            found = self._compiled(kind, text)
        with self._lock:
            self._read[wanted] = found
            self._read.move_to_end(wanted)
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
            return Constraint(found.deep_copy(), f"sampling.{kind}", text)

    def masks(self, constraints: Sequence[Constraint]) -> Tensor:
        """Return which tokens may come next in each, found in parallel threads.

        Returns:
            (b, words of 32 tokens) int32, the lowest bit the first token.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        mask_bw = allocate_token_bitmask(len(constraints), self._vocab_size)
        pairs = [(constraint.matcher, i) for i, constraint in enumerate(constraints)]
        fill_next_token_bitmask_par(self._executor, pairs, mask_bw)
        return torch.from_numpy(mask_bw[:, : mask_words(self._vocab_size)].view(np.int32))

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor()

    @cached_property
    def _ids(self) -> Any:
        from llguidance import LLTokenizer

        tokenizer = self._tokenizer
        return LLTokenizer(
            tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=tokenizer.eos_id
        )

    def _compiled(self, kind: str, text: str) -> LLMatcher:
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError(
                f"sampling.{kind}",
                text[:80],
                "needs the package llguidance; pip install 'mamba2lm[structured]'.",
            )
        from llguidance import LLMatcher, LLParserLimits

        read = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }[kind]
        try:
            if kind == "json_schema":
                _check_json(text)  # the package would take it for a part of its own text
            limits = LLParserLimits(**_LIMITS)
            matcher = LLMatcher(self._ids, read(text), log_level=0, limits=limits)
            # The first takes longest, and what it finds its copies know.
            matcher.compute_bitmask()
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        except ValueError as error:
            why = " ".join(str(error).split())[:300]
            raise ConfigError(f"sampling.{kind}", text[:80], f"cannot be read: {why}") from error
        return matcher


def _check_json(text: str) -> None:
    """Refuse what is no JSON.

    Raises:
        ValueError: Saying where.
    """
    try:
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{error}; it has to be a schema itself, in JSON") from error
