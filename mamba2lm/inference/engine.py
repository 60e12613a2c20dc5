"""Generation for many at once: requests join and leave a running batch between two steps.

A prompt of any length is read through ``LanguageModel.forward`` in chunks; what is left of it is a
state whose size does not depend on its length (attention apart). From there the running batch
(``batch.py``) feeds one token a row and step. Between two steps at most ``prefill_chunk`` prompt
tokens are read, in turns, so a long prompt delays neither the rows that decode nor the prompts
behind it.

On a CPU nothing is padded, and where a prompt is cut into chunks depends on that prompt alone (and
on what the state cache holds); a GPU, where a small pass takes as long as a larger one, reads
prompts together. Rows of a batch do not touch each other; so what a request gets is what it would
get alone.

Axes: b batch row, l length, v vocabulary.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.inference.batch import Batch, DrawnTokens, Flight, Slot
from mamba2lm.inference.decoding import Completion, Row
from mamba2lm.inference.pace import Pace
from mamba2lm.inference.prefill import Prefill
from mamba2lm.inference.request import EngineStats, Event, Job, Request
from mamba2lm.inference.rows import Read
from mamba2lm.inference.sampling import MAX_LOGPROBS, SamplingConfig
from mamba2lm.inference.session import Session
from mamba2lm.inference.state_cache import StateCache
from mamba2lm.inference.structured import Constraints
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError, closest

log = logging.getLogger(__name__)

STATE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
GREEDY = SamplingConfig(temperature=0.0)
# Rows from which on steps go on though a reply's state is wanted for the cache.
_CROWD = 8


class Engine:
    """Run a model for many requests at once. One thread uses it."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        prefill_chunk: int = 2048,
        max_rows: int = 64,
        state_dtype: str = "auto",
        state_cache_bytes: int = 0,
        sync_every: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Bind a model to its tokenizer.

        Args:
            model: On the device it shall run on.
            tokenizer: The one it was trained with.
            prefill_chunk: Most prompt tokens read between two steps; bounds memory and delay.
            max_rows: Most continuations that decode at once; more wait.
            state_dtype: Of recurrent states while they decode: ``auto`` (float32, or float64 with
                float64 weights), ``float32``, or ``bfloat16``, which halves their traffic and
                costs accuracy.
            state_cache_bytes: Budget of the state cache; 0 for none.
            sync_every: Most tokens a row draws before the host looks at them; default 16 on a GPU
                and 1 elsewhere. A streamed token waits at most about 10 ms for others.
            cuda_graphs: Replay steps as CUDA graphs on a GPU.

        Raises:
            ConfigError: A value out of its range.
        """
        for key, value in (("prefill_chunk", prefill_chunk), ("max_rows", max_rows)):
            if value < 1:
                raise ConfigError(key, value, "must be ≥ 1.")
        if state_cache_bytes < 0:
            raise ConfigError("state_cache_bytes", state_cache_bytes, "must be ≥ 0.")
        if sync_every is not None and sync_every < 1:
            raise ConfigError("sync_every", sync_every, "must be ≥ 1.")
        if state_dtype not in STATE_DTYPES:
            raise ConfigError(
                "state_dtype",
                state_dtype,
                f"must be one of {', '.join(STATE_DTYPES)}.{closest(state_dtype, STATE_DTYPES)}",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.cache = StateCache(state_cache_bytes)
        self.stats = EngineStats()
        on_gpu = self.device.type == "cuda"
        self.sync_every = sync_every if sync_every is not None else 16 if on_gpu else 1
        self._overlap = on_gpu
        self.constraints = Constraints(tokenizer, model.vocab_size)
        self.batch = Batch(
            model,
            max_rows,
            recurrent_dtype=STATE_DTYPES[state_dtype],
            graphs=cuda_graphs,
            masks=self.constraints.masks,
        )
        self._pace = Pace(self.sync_every, steady=model.tensor is not None)
        self._heard_at = 0.0
        self._flights: deque[Flight] = deque()
        self._waiting: deque[Job] = deque()
        self._prefill = Prefill(
            model,
            self.cache,
            self.stats,
            chunk=prefill_chunk,
            graphs=cuda_graphs,
            fail=self._fail,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._prefill.jobs or self.batch.slots or self._flights)

    @property
    def waiting(self) -> int:
        """Requests that no token has been read of."""
        return len(self._waiting)

    @property
    def reading(self) -> int:
        """Requests whose prompts are being read."""
        return len(self._prefill.jobs)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return a prompt's ids as the model reads the beginning of a document."""
        return [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int,
        seeds: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continue several prompts together; equal ones are read once.

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
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(prompts))
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds has {len(seeds)} entries; expected {len(prompts)}, one a row.")
        sampling = self.checked(sampling, max_new_tokens)
        places: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            places.setdefault(prompt, []).append(i)
        jobs: list[tuple[list[int], Job]] = []
        for prompt, indices in places.items():
            ids = self.prompt_ids(prompt)
            for start in range(0, len(indices), self.max_rows):
                members = indices[start : start + self.max_rows]
                request = Request(ids, sampling, max_new_tokens, [seeds[i] for i in members])
                jobs.append((members, self.submit(request)))
        self.run([job for _, job in jobs])
        found = {
            i: completion
            for members, job in jobs
            for i, completion in zip(members, job.completions(), strict=True)
        }
        return [found[i] for i in range(len(prompts))]

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

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Job:
        """Queue a request; ``advance`` works on it.

        Args:
            request: What to do.
            listener: Called during ``advance`` with whatever is new; must not call the engine.

        Raises:
            ConfigError: Something in the request is out of range.
        """
        self.checked(request.sampling, request.max_new_tokens)
        if not request.prompt_ids:
            raise ConfigError("prompt", [], "is empty; give at least one token.")
        wrong = [i for i in request.prompt_ids if not 0 <= i < self.model.vocab_size]
        if wrong:
            raise ConfigError(
                "prompt", wrong[0], f"is no token; ids go from 0 to {self.model.vocab_size - 1}."
            )
        if not 1 <= len(request.seeds) <= self.max_rows:
            raise ConfigError(
                "seeds",
                len(request.seeds),
                f"a request has at least 1 and at most {self.max_rows} continuations.",
            )
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
            raise ConfigError("logprobs", request.logprobs, f"must be from 0 to {MAX_LOGPROBS}.")
        constraints = [self.constraints.begin(request.sampling) for _ in request.seeds]
        rows = [
            Row(
                self.tokenizer,
                max_new_tokens=request.max_new_tokens,
                stop=request.sampling.stop,
                stop_token_ids=request.sampling.stop_token_ids,
                ignore_eos=request.ignore_eos,
                grows=request.stream,
            )
            for _ in request.seeds
        ]
        job = Job(request, rows, listener, constraints)
        self._waiting.append(job)
        return job

    def run(self, jobs: Sequence[Job]) -> None:
        """Advance until these jobs are done; others go on with them."""
        while not all(job.done for job in jobs):
            self.advance()

    def warm_up(self) -> None:
        """Compile, and record on a GPU, what requests will need, so that none waits for it.

        Reads prompts of several lengths, alone and together, and decodes every number of rows that
        steps run over, the largest first. What was read and drawn is forgotten. Where memory does
        not suffice for ``max_rows``, the rest is left until it is needed.
        """
        assert self.idle
        began = time.perf_counter()
        before, budget = copy.deepcopy(self.stats), self.cache.budget
        self.cache.budget = 0
        try:
            self._prefill.record()
            chunk = self._prefill.chunk
            fits = all(
                self._try(lengths, GREEDY) for lengths in ([17], [1], [40, 25], [chunk + 16])
            )
            log.info("prompts have been read (%.1f s)", time.perf_counter() - began)
            limited = SamplingConfig(top_p=0.95)
            for rows in reversed(self.batch.step_rows):
                drawn = [GREEDY, SamplingConfig()]
                drawn += [limited] if rows == self.max_rows else []
                fits = fits and all(self._try([1], sampling, rows) for sampling in drawn)
            seconds = time.perf_counter() - began
            if fits:
                log.info("steps of up to %d rows have been run (%.1f s)", self.max_rows, seconds)
            else:
                log.warning("not all that requests need could be tried (%.1f s)", seconds)
        finally:
            self.cache.budget = budget
            vars(self.stats).update(vars(before))

    def _try(self, lengths: Sequence[int], sampling: SamplingConfig, rows: int = 1) -> bool:
        """Run requests of some prompts and two tokens; return whether all went well."""
        jobs = [
            self.submit(Request([0] * length, sampling, 2, range(rows), ignore_eos=True))
            for length in lengths
        ]
        self.run(jobs)
        return not any(job.error for job in jobs)

    def advance(self) -> None:
        """Admit what fits, read some of the prompts, and draw for every row that decodes.

        A request that fails ends with ``Job.error``; the others go on.
        """
        self._admit()
        self._start(self._prefill.advance())
        self._decode()

    def cancel(self, job: Job) -> None:
        """End a job where it is and free its rows; what was drawn stays.

        With ``keep_state`` the state is left as after a text that ended by itself.
        """
        if job.done:
            return
        for queue in (self._waiting, self._prefill.jobs):
            if job in queue:
                queue.remove(job)
        running = {
            slot.owner[1]: i for i, slot in enumerate(self.batch.slots) if slot.owner[0] is job
        }
        for index, row in enumerate(job.rows):
            if row.finish_reason is None:
                row.finish("interrupted")
                if index in running:
                    try:
                        self._keep_state(job, index, running[index])
                    except torch.OutOfMemoryError as error:
                        job.error = error
                self._tell(job, index)
        self.batch.leave(running.values())

    def _admit(self) -> None:
        promised = len(self.batch) + sum(len(job.rows) for job in self._prefill.jobs)
        while self._waiting and promised + len(self._waiting[0].rows) <= self.max_rows:
            job = self._waiting.popleft()
            promised += len(job.rows)
            job.began_at = time.perf_counter()
            self._prefill.add(job)

    def _start(self, jobs: list[Job]) -> None:
        """Draw the first tokens of prompts that have been read, all in one."""
        slots: list[Slot] = []
        states: list[Read] = []
        logits: list[Tensor] = []
        for job in jobs:
            request = job.request
            assert job.read is not None
            assert job.logits_v is not None
            if not request.max_new_tokens:
                job.first_at = time.perf_counter()
                if request.keep_state:
                    job.state = job.read.alone()
                for index, row in enumerate(job.rows):
                    row.finish("length")
                    self._tell(job, index)
                continue
            before = 0 if request.state is None else request.state.tokens
            seen: set[int] = set()
            if request.sampling.repetition_penalty != 1:
                seen = {*request.prompt_ids, *request.seen} - {self.tokenizer.eos_id}
            for index, seed in enumerate(request.seeds):
                slots.append(
                    Slot(
                        owner=(job, index),
                        tokens=before + len(request.prompt_ids),
                        left=request.max_new_tokens,
                        sampling=request.sampling,
                        seed=seed,
                        seen=seen,
                        logprobs=request.logprobs,
                        constraint=job.constraints[index],
                    )
                )
                states.append(job.read)
                logits.append(job.logits_v)
        if slots:
            try:
                self._flights.append(self.batch.join(slots, states, torch.stack(logits)))
            except Exception as error:
                for job in {
                    id(owner): owner for owner, _ in (slot.owner for slot in slots)
                }.values():
                    self._fail(job, error)
                return
        for job in jobs:
            job.read = job.logits_v = None

    def _decode(self) -> None:
        """Take some steps and hear what those before have drawn."""
        overlapped = self._overlaps()
        if overlapped:
            self._retire()
        else:
            self._hear(0)
        if self.batch.slots:
            count = self._stride()
            try:
                self.batch.reserve(count)
            except Exception as error:
                # It is the longest row that caches of attention have to grow for.
                longest = max(self.batch.slots, key=lambda slot: slot.tokens).owner[0]
                self._leave({longest})
                self._fail(longest, error)
                return
            try:
                self._flights.append(self.batch.launch(count))
            except Exception as error:
                self._fail_batch(error)
                return
            self.stats.steps += count
            if overlapped:
                self._retire()
        self._hear(1 if overlapped else 0)

    def _retire(self) -> None:
        """Take rows out that end with what is on its way, whatever it is."""
        self.batch.leave([i for i, slot in enumerate(self.batch.slots) if slot.left <= 0])

    def _overlaps(self) -> bool:
        """Return whether steps go on before their tokens are known.

        Rows that end by a token then take some more steps for nothing, which costs less than a GPU
        that waits for the host. A state that is wanted must not have read so far.
        """
        if not self._overlap or self.batch.constrained:
            return False
        jobs = [slot.owner[0] for slot in self.batch.slots]
        if any(job.request.keep_state for job in jobs):
            return False
        cached = self.cache.budget and len(jobs) < _CROWD
        return not (cached and any(job.request.cache_reply for job in jobs))

    def _stride(self) -> int:
        """Return how many steps to take before looking at what they drew."""
        left, streamed = 1, False
        for slot in self.batch.slots:
            job = slot.owner[0]
            if job.request.keep_state:
                return 1  # a state is wanted as of the very token that ends a text
            streamed = streamed or job.request.stream
            left = max(left, slot.left)
        return 1 if self.batch.constrained else self._pace.steps(left, streamed=streamed)

    def _hear(self, keep: int) -> None:
        """Take in what was drawn, all but the last ``keep`` flights while there are rows."""
        while len(self._flights) > (keep if self.batch.slots else 0):
            flight = self._flights.popleft()
            began = time.perf_counter()
            try:
                flight.wait()
                self._heard_at = time.perf_counter()
                drawn = flight.tokens()
            except Exception as error:
                self._fail_batch(error, flight)
                return
            self._pace.heard(flight, self._heard_at - began)
            self._push(flight, drawn)

    def _push(self, flight: Flight, drawn: list[DrawnTokens]) -> None:
        """Hand tokens to the rows they belong to; rows that end leave the batch."""
        places = {slot: i for i, slot in enumerate(self.batch.slots)}
        leaving: list[int] = []
        failed: dict[Job, Exception] = {}
        for slot, tokens in zip(flight.slots, drawn, strict=True):
            job, index = slot.owner
            row: Row = job.rows[index]
            if job in failed or job.error is not None or row.finish_reason is not None:
                continue  # drawn for nothing
            if not row.token_ids:
                job.first_at = max(job.first_at, self._heard_at)
            count = len(row.token_ids)
            finite = tokens.token_ids
            if -1 in finite:
                finite = finite[: finite.index(-1)]
            try:
                if slot.constraint is not None:
                    slot.constraint.check()
                if finite:
                    row.extend(finite, tokens.logprobs)
                if slot.constraint is not None and finite and row.finish_reason is None:
                    (token_id,) = finite
                    if slot.constraint.take(token_id):
                        row.finish("stop")
            except ConfigError as error:
                failed[job] = error
                continue
            if row.finish_reason is None and len(finite) < flight.steps:
                failed[job] = RuntimeError("the model's output is not finite")
                continue
            count = len(row.token_ids) - count
            self.stats.new_tokens += count
            if row.finish_reason is not None and slot in places:
                # A state that has read beyond the end is of no use.
                taken = count + (row.ended_by is not None)
                if taken == flight.steps and not self._flights:
                    try:
                        self._keep_state(job, index, places[slot])
                    except torch.OutOfMemoryError as error:
                        failed[job] = error
                        continue
                leaving.append(places[slot])
            if job.request.stream or row.finish_reason is not None or not row.told:
                self._tell(job, index)
        self.batch.leave(leaving)
        self._leave(failed)
        for job, error in failed.items():
            self._fail(job, error)

    def _leave(self, jobs: Collection[Job]) -> None:
        """Take all rows of these jobs out of the batch."""
        self.batch.leave([i for i, slot in enumerate(self.batch.slots) if slot.owner[0] in jobs])

    def _keep_state(self, job: Job, index: int, i: int) -> None:
        """Save the state of batch row i, which has ended, for whoever asked."""
        request, row = job.request, job.rows[index]
        cached = request.cache_reply and request.state is None and self.cache.budget
        if index or not (request.keep_state or cached):
            return
        # Whatever ended the text was drawn last and has not been read.
        drawn = row.token_ids if row.ended_by is not None else row.token_ids[:-1]
        ids = [*request.prompt_ids, *drawn]
        if not request.keep_state and self.batch.slots[i].tokens != len(ids):
            return  # cancelled after steps that nobody has looked at yet: it has read too far
        try:
            state = self.batch.state_of(i)
        except torch.OutOfMemoryError as error:
            if request.keep_state:
                raise
            log.warning("there is no memory to cache a reply's state in: %s", error)
            return
        if request.keep_state:
            job.state = state
        if cached:
            self.cache.put(ids, state)

    def _tell(self, job: Job, index: int) -> None:
        """Let whoever listens hear what is new of a continuation since the last time."""
        row = job.rows[index]
        if row.finish_reason is not None:
            self.stats.finished[row.finish_reason] += 1
        text, tokens, logprobs = row.news()
        if job.listener is not None:
            job.listener(Event(job, index, text, tokens, logprobs, row.finish_reason))

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error; its rows are out of the batch already."""
        log.warning("a request failed: %s", error, exc_info=error)
        job.error = error
        job.read = job.logits_v = None
        self.stats.finished["error"] += 1
        if job.listener is not None:
            job.listener(Event(job, 0, "", 0, [], None))

    def _fail_batch(self, error: Exception, *flights: Flight) -> None:
        """End all jobs of the batch: after an error within a step their states are lost.

        Args:
            error: What happened.
            flights: Taken in already, beside those still on their way.
        """
        slots = [*self.batch.slots]
        for flight in (*flights, *self._flights):
            slots += flight.slots
        jobs = dict.fromkeys(slot.owner[0] for slot in slots)
        self._flights.clear()
        self.batch.clear()
        for job in jobs:
            if not job.done:
                self._fail(job, error)
