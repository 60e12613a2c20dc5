"""What is asked of an engine, and what comes of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mamba2lm.inference.decoding import Completion, FinishReason, Row, TokenLogprob
from mamba2lm.inference.rows import Read
from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.inference.structured import Constraint
from mamba2lm.models import ModelState


@dataclass
class EngineStats:
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    """Read, those found in the cache not counted."""
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Continuations by how they ended; ``error`` among them."""


@dataclass
class Request:
    """What to continue and how."""

    prompt_ids: Sequence[int]
    """At least one; ``Engine.prompt_ids`` makes them from a text."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 256
    seeds: Sequence[int] = (0,)
    """One continuation a seed; the prompt is read once."""
    logprobs: int | None = None
    """Report each token's log-probability and this many alternatives; None for nothing."""
    prompt_logprobs: bool = False
    """Report those of the prompt's tokens too, all but the first's."""
    ignore_eos: bool = False
    stream: bool = False
    """Tell of tokens soon after they are drawn; else of the first ones, and of all at the end."""
    state: ModelState | None = None
    """What was read before the prompt; not changed."""
    seen: Collection[int] = ()
    """Ids that the repetition penalty applies to beside the prompt's."""
    keep_state: bool = False
    """Leave the state after the first continuation in ``Job.state``."""
    cache_reply: bool = False
    """Put that state in the state cache, for a prompt that goes on from there. Not where the text
    ended before the last of several tokens drawn at once, or steps went on for other rows before it
    was known to end: the state then has read too far."""


@dataclass
class Event:
    """Something new about one continuation."""

    job: Job
    row: int
    text: str
    """What has become certain of it."""
    tokens: int
    """Tokens drawn since the event before."""
    logprobs: list[TokenLogprob]
    """Theirs, where asked for."""
    finish_reason: FinishReason | None
    """Set on the last event of a continuation."""


class Job:
    """A request on its way through the engine."""

    def __init__(
        self,
        request: Request,
        rows: list[Row],
        listener: Callable[[Event], None] | None,
        constraints: Sequence[Constraint | None],
    ) -> None:
        self.request = request
        self.rows = rows
        self.constraints = constraints
        """What each row must follow."""
        self.listener = listener
        self.error: Exception | None = None
        """Why it ended without its texts."""
        self.state: ModelState | None = None
        """With ``keep_state``: after all tokens read, which is all but the one drawn last."""
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.began_at = self.first_at = time.perf_counter()
        # The engine's own: how far the prompt has been read, where it is cut, and what is left of
        # it; the logits only once its end is reached.
        self.position = 0
        self.cuts: list[int] = []
        self.read = None if request.state is None else Read(request.state)
        self.logits_v: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.error is not None or all(row.finish_reason is not None for row in self.rows)

    def completions(self) -> list[Completion]:
        """Return its texts.

        Raises:
            Exception: What ended it early, if anything did.
        """
        if self.error is not None:
            raise self.error
        assert self.done
        return [
            Completion(
                text=row.text,
                token_ids=list(row.token_ids),
                finish_reason=row.finish_reason or "interrupted",
                prompt_tokens=len(self.request.prompt_ids),
                prefill_seconds=self.first_at - self.began_at,
                decode_seconds=max(row.finished_at - self.first_at, 0.0),
                cached_tokens=self.cached_tokens,
                logprobs=list(row.logprobs),
            )
            for row in self.rows
        ]
