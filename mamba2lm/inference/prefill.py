"""Reading prompts, some tokens at a time between two steps of the rows that decode.

On a CPU nothing is padded, and where a prompt is cut into chunks depends on that prompt alone (and
on what the state cache holds); a GPU, where a small pass takes as long as a larger one, reads
prompts together.

Axes: b batch row, l length, v vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from mamba2lm.inference.decoding import TokenLogprob
from mamba2lm.inference.request import EngineStats, Job
from mamba2lm.inference.rows import Read
from mamba2lm.inference.sampling import sent
from mamba2lm.inference.state_cache import StateCache
from mamba2lm.inference.whole_prompts import WholePrompts
from mamba2lm.models import LanguageModel, ModelState

log = logging.getLogger(__name__)

# Prompts being read from which on unequal ones are read together, where that pays.
_CROWD = 4
# Tokens that a pass may read for nothing whatever it reads: they cost a GPU less than a launch.
_SMALL = 256
# Logits of this many prompt positions are held at once where their probabilities are asked for.
_SCORED_CHUNK = 256


class Prefill:
    """Prompts on their way from ids to states."""

    def __init__(
        self,
        model: LanguageModel,
        cache: StateCache,
        stats: EngineStats,
        *,
        chunk: int,
        graphs: bool,
        fail: Callable[[Job, Exception], None],
    ) -> None:
        """Start with none.

        Args:
            model: On its device.
            cache: Where prompts may be found, and are put.
            stats: Counts what is read and found.
            chunk: Most tokens read by one ``advance``.
            graphs: Record whole prompts' passes as CUDA graphs on a GPU.
            fail: Called with a job whose prompt cannot be read; it is out already.
        """
        self.jobs: deque[Job] = deque()
        self.chunk = chunk
        self._model = model
        self._device = model.embedding.weight.device
        self._cache = cache
        self._stats = stats
        self._fail = fail
        # Reading prompts together fills a GPU. A CPU gains nothing, and keeps its promise that not
        # a bit of a row depends on another.
        self._together = self._device.type == "cuda"
        self._whole: WholePrompts | None = None
        # What stands before a shorter prompt would stay in an attention cache.
        if all(block.mixer.constant_state for block in model.blocks):
            self._whole = WholePrompts(model, most=chunk, record=graphs and self._together)
        self._passes = 1

    def add(self, job: Job) -> None:
        """Take a job, from where the cache knows its prompt."""
        request, cuts = job.request, {len(job.request.prompt_ids)}
        if request.state is None and not request.prompt_logprobs and self._cache.budget:
            found = self._cache.find(request.prompt_ids)
            job.read = None if found.state is None else Read(found.state)
            job.logits_v = found.logits_v
            job.position = job.cached_tokens = found.length
            self._stats.cached_tokens += found.length
            shared = self._cache.shared(request.prompt_ids)
            if shared > found.length:
                cuts.add(shared)
        job.cuts = sorted(cuts)
        self.jobs.append(job)

    def advance(self) -> list[Job]:
        """Read at most ``chunk`` tokens; return the jobs whose prompts have been read."""
        budget = self.chunk
        # A prompt that was found whole costs nothing.
        ready = [job for job in self.jobs if job.logits_v is not None]
        self.jobs = deque(job for job in self.jobs if job.logits_v is None)
        while self.jobs:
            whole: list[Job] = []
            others: list[Job] = []
            for job in self.jobs:
                (whole if self._takes_whole(job) else others).append(job)
            length: int | None = None
            if whole and (not others or self._passes % 4):
                group, tokens = self._whole_prompts(whole, budget)
            else:
                group, length = self._next_group(others, budget)
                tokens = length * len(group)
            if not group or tokens > budget:
                break  # whose turn it is keeps it, and has the next budget
            self._passes += 1
            budget -= tokens
            for job in group:
                self.jobs.remove(job)
            for job in self._read(group, length):
                if job.position == len(job.request.prompt_ids):
                    ready.append(job)
                else:
                    self.jobs.append(job)
        return ready

    def record(self) -> None:
        """Record what whole prompts are read with, so that none waits for it."""
        if self._whole is not None:
            self._whole.record()

    def _takes_whole(self, job: Job) -> bool:
        """Return whether a prompt is read from its beginning to its end, maybe with others."""
        request, length = job.request, len(job.request.prompt_ids)
        if not self._together or self._whole is None or self._whole.shape(1, length) is None:
            return False
        return job.read is None and job.cuts == [length] and not request.prompt_logprobs

    def _whole_prompts(self, jobs: list[Job], budget: int) -> tuple[list[Job], int]:
        """Return which of such prompts one pass reads, and how many tokens that takes.

        Most of it is theirs, or little is lost.
        """
        assert self._whole is not None
        group: list[Job] = []
        longest = total = tokens = 0
        for job in jobs:
            length = len(job.request.prompt_ids)
            shape = self._whole.shape(len(group) + 1, max(longest, length))
            if shape is None or shape[0] * shape[1] > min(budget, 2 * (total + length) + _SMALL):
                continue
            group.append(job)
            longest, total, tokens = max(longest, length), total + length, shape[0] * shape[1]
        return group, tokens

    def _next_group(self, jobs: list[Job], budget: int) -> tuple[list[Job], int]:
        """Return which jobs read how many tokens next, within the budget if that is possible.

        Jobs take turns. Where reading together pays, so do jobs with the same number of tokens to
        read; in a crowd all numbers are powers of two and the smallest go first, so that any number
        of unequal prompts takes a few passes. Every fourth pass is the next one's in turn.
        """
        crowd = self._together and len(jobs) >= _CROWD
        head = jobs[0]
        if crowd and self._passes % 4:
            head = min(jobs, key=lambda job: self._next_length(job, crowd))
        length = self._next_length(head, crowd)
        if not self._together:
            return [head], length
        group = [job for job in jobs if self._next_length(job, crowd) == length]
        return group[: max(budget // length, 1)], length

    def _next_length(self, job: Job, crowd: bool) -> int:
        """Return how many tokens a job reads next; without a crowd its prompt alone decides."""
        most = self.chunk
        if job.request.prompt_logprobs:
            most = min(most, _SCORED_CHUNK)
        left = next(cut for cut in job.cuts if cut > job.position) - job.position
        if crowd:
            return min(left & -left, 1 << (most.bit_length() - 1))
        return min(most, left)

    def _read(self, group: list[Job], length: int | None) -> list[Job]:
        """Read the next tokens of each job, or all where None; return those it worked for."""
        try:
            if length is None:
                self._read_whole(group)
            else:
                self._read_chunk(group, length)
        except Exception as error:
            if length is None and isinstance(error, torch.OutOfMemoryError):
                # What whole prompts are read with has room for many rows; one takes less.
                log.warning("there is no memory to read whole prompts together in: %s", error)
                lengths = [len(job.request.prompt_ids) for job in group]
                alone = [self._read([job], n) for job, n in zip(group, lengths, strict=True)]
                return [job for found in alone for job in found]
            if len(group) == 1:
                self._fail(group[0], error)
                return []
            # One of them may be at fault; the others must not suffer.
            return [job for alone in group for job in self._read([alone], length)]
        for job in group:
            left = len(job.request.prompt_ids) - job.position
            read = left if length is None else min(length, left)
            job.position += read
            self._stats.prompt_tokens += read
            if job.request.state is None and job.position in job.cuts and self._cache.budget:
                self._remember(job)
        return group

    def _remember(self, job: Job) -> None:
        """Put what has been read of a prompt in the cache, if there is memory."""
        assert job.read is not None
        try:
            # Copies: as views they would hold on to the others of the group.
            logits_v = job.logits_v.clone() if job.logits_v is not None else None
            state = job.read.alone()
        except torch.OutOfMemoryError as error:
            log.warning("there is no memory to cache a prompt's state in: %s", error)
            return
        self._cache.put(job.request.prompt_ids[: job.position], state, logits_v)

    def _read_whole(self, group: list[Job]) -> None:
        assert self._whole is not None
        states, logits_bv = self._whole.read([job.request.prompt_ids for job in group])
        for i, job in enumerate(group):
            job.read, job.logits_v = Read(states, i), logits_bv[i]

    @torch.inference_mode()
    def _read_chunk(self, group: list[Job], length: int) -> None:
        rows = [job.request.prompt_ids[job.position : job.position + length] for job in group]
        states = [
            self._model.new_state(1) if job.read is None else job.read.alone() for job in group
        ]
        state = states[0] if len(group) == 1 else ModelState.concat(states)
        scored = any(job.request.prompt_logprobs for job in group)
        ids_bl = sent(rows, torch.int64, self._device)
        output = self._model(ids_bl, state=state, last_only=not scored)
        assert output.logits is not None
        assert output.state is not None
        found: list[tuple[list[TokenLogprob], Tensor | None]] = []
        for i, job in enumerate(group):
            last = job.position + length == len(job.request.prompt_ids)
            scores = self._scores(job, output.logits[i]) if job.request.prompt_logprobs else []
            # A copy: a view would hold on to the logits of the whole chunk.
            found.append((scores, output.logits[i, -1].clone() if last else None))
        # All or none, as after an error each reads its chunk again, from where it was.
        for i, (job, (scores, logits_v)) in enumerate(zip(group, found, strict=True)):
            job.prompt_logprobs += scores
            job.read, job.logits_v = Read(output.state, i), logits_v

    def _scores(self, job: Job, logits_lv: Tensor) -> list[TokenLogprob]:
        """Return the log-probabilities that a chunk's logits give the tokens after it."""
        start = job.position + 1
        following = job.request.prompt_ids[start : start + logits_lv.shape[0]]
        logprob_lv = logits_lv[: len(following)].log_softmax(dim=-1)
        count = job.request.logprobs or 0
        index_l1 = torch.tensor(list(following), device=self._device)[:, None]
        chosen = logprob_lv.gather(1, index_l1)[:, 0].tolist() if following else []
        top = logprob_lv.topk(min(count, logprob_lv.shape[1]), dim=-1)
        tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            TokenLogprob(token, logprob, list(zip(ids, values, strict=True)))
            for token, logprob, (ids, values) in zip(following, chosen, tops, strict=True)
        ]
