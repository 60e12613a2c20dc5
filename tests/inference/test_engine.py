from __future__ import annotations

import gc
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mamba2lm.inference import Engine, Event, Job, Request, SamplingConfig
from mamba2lm.inference.batch import Flight
from mamba2lm.inference.decoding import TokenLogprob
from mamba2lm.inference.pace import Pace
from mamba2lm.inference.request import EngineStats
from mamba2lm.inference.rows import Read, Rows
from mamba2lm.inference.sampling import Drawn, SamplingRows
from mamba2lm.models import LanguageModel, ModelState
from mamba2lm.schema import ConfigError
from tests.inference import helpers

GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [
    "It is a truth universally acknowledged, that a single man",
    "Emma Woodhouse,",
    "",
    "She was",
    "Emma Woodhouse,",
    "It was then disclosed in the following manner. Observing his second daughter employed",
]


def engine(
    pattern: str, *, dtype: torch.dtype = torch.float32, chunk: int = 2048, **options: int | str
) -> Engine:
    model = helpers.model(pattern, dtype=dtype)
    return Engine(model, helpers.tokenizer(), prefill_chunk=chunk, **options)  # type: ignore[arg-type]


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 500, (length,), generator=generator).tolist() for length in lengths]


def full_logits(model: LanguageModel, ids: list[int]) -> Tensor:
    """Return the logits (l, v) of one parallel forward without any state."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    assert logits is not None
    return logits[0]


def alone(built: Engine, request: Request) -> Job:
    """Return what becomes of a request that nothing else is beside."""
    assert built.idle
    job = built.submit(request)
    built.run([job])
    assert built.idle
    return job


def tokens_of(job: Job) -> list[list[int]]:
    return [completion.token_ids for completion in job.completions()]


@pytest.fixture
def count_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give a list to which each forward pass adds the number of prompt tokens it reads."""
    read: list[int] = []
    forward = LanguageModel.forward

    def counted(self: LanguageModel, input_ids: Tensor, *args: object, **kw: object) -> object:
        read.append(input_ids.numel())
        return forward(self, input_ids, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "forward", counted)
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_greedy_decoding_takes_the_full_forwards_argmax(pattern: str, dtype: torch.dtype) -> None:
    built = engine(pattern, dtype=dtype)
    (found,) = built.generate(PROMPTS[:1], GREEDY, max_new_tokens=40)
    prompt = built.prompt_ids(PROMPTS[0])
    assert len(found.token_ids) >= 20
    assert len(set(found.token_ids)) >= 5, "the model repeats itself; the test would show little"
    best = full_logits(built.model, prompt + found.token_ids).argmax(dim=-1).tolist()
    drawn = best[len(prompt) - 1 :]
    assert drawn[: len(found.token_ids)] == found.token_ids
    if found.finish_reason == "eos":
        assert drawn[len(found.token_ids)] == built.tokenizer.eos_id
    else:
        assert len(found.token_ids) == 40
    assert found.prompt_tokens == len(prompt)


@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_every_probability_is_the_full_forwards(pattern: str) -> None:
    built = engine(pattern, dtype=torch.float64, chunk=6)
    prompts = random_ids(9, 1, 23, 9, 14, 70)
    requests = [
        Request(ids, GREEDY, 15, logprobs=3, prompt_logprobs=True, ignore_eos=True)
        for ids in prompts
    ]
    jobs = [built.submit(request) for request in requests]
    built.run(jobs)
    for ids, job in zip(prompts, jobs, strict=True):
        (found,) = job.completions()
        whole = ids + found.token_ids
        expected = full_logits(built.model, whole).log_softmax(dim=-1)
        reported = job.prompt_logprobs + found.logprobs
        assert [token.token_id for token in reported] == whole[1:]
        for place, token in enumerate(reported):
            assert token.logprob == pytest.approx(
                float(expected[place, whole[place + 1]]), abs=1e-9
            )
            best = expected[place].topk(3)
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingConfig(temperature=1.2, top_p=0.95, repetition_penalty=1.3)],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_a_batch_gives_what_single_runs_give(pattern: str, sampling: SamplingConfig) -> None:
    built = engine(pattern)
    seeds = [11, 12, 13, 14, 15, 16]
    together = built.generate(PROMPTS, sampling, max_new_tokens=25, seeds=seeds)
    for prompt, seed, found in zip(PROMPTS, seeds, together, strict=True):
        (single,) = built.generate([prompt], sampling, max_new_tokens=25, seeds=[seed])
        assert single.token_ids == found.token_ids
        assert single.text == found.text
        assert single.finish_reason == found.finish_reason


def test_warming_up_leaves_nothing_and_changes_nothing(
    caplog: pytest.LogCaptureFixture, count_read: list[int]
) -> None:
    built = engine("MA", chunk=32, max_rows=6, state_cache_bytes=1 << 20)
    with caplog.at_level("INFO"):
        built.warm_up()
    assert built.idle
    assert not built.batch.slots
    assert len(built.cache) == 0
    assert built.cache.budget == 1 << 20
    assert built.stats == EngineStats()
    # A chunk and the rest of a longer prompt; a token for each of three numbers of rows, twice and
    # for the largest thrice.
    assert sum(count_read) == 17 + 1 + 40 + 25 + 48 + 2 * 3 + 1
    assert "steps of up to 6 rows" in caplog.text
    cold = engine("MA", chunk=32, max_rows=6)
    found, wanted = (each.generate(PROMPTS, GREEDY, max_new_tokens=9) for each in (built, cold))
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]


def test_warming_up_says_what_did_not_fit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = engine("M", max_rows=6)
    grown = SamplingRows.grown

    def short(rows: SamplingRows, capacity: int) -> SamplingRows:
        if capacity > 4:
            raise torch.OutOfMemoryError("no room")
        return grown(rows, capacity)

    monkeypatch.setattr(SamplingRows, "grown", short)
    built.warm_up()
    assert "not all that requests need could be tried" in caplog.text
    assert built.idle
    assert built.stats == EngineStats()


@pytest.mark.parametrize("pattern", ["MSWF", "MA"])
def test_requests_join_and_leave_without_touching_each_other(pattern: str) -> None:
    built = engine(pattern, chunk=16, max_rows=5)
    rng = random.Random(3)
    requests = [
        Request(
            ids,
            SamplingConfig(temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([0.9, 1.0])),
            rng.randint(1, 30),
            seeds=[rng.randint(0, 10**9)],
            logprobs=0,
        )
        for ids in random_ids(*(rng.randint(1, 90) for _ in range(24)), seed=2)
    ]
    jobs, sizes = [], set()
    for request in requests:
        jobs.append(built.submit(request))
        for _ in range(rng.randint(0, 6)):
            built.advance()
            sizes.add(len(built.batch))
    built.run(jobs)
    assert sizes >= {1, 2, 3, 4, 5}
    for request, job in zip(requests, jobs, strict=True):
        single = alone(built, request)
        assert tokens_of(single) == tokens_of(job)
        found = [token.logprob for token in job.rows[0].logprobs]
        expected = [token.logprob for token in single.rows[0].logprobs]
        # On the machine this was written on they are equal to the last bit.
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_a_seed_names_a_text(pattern: str) -> None:
    built = engine(pattern)
    sampling = SamplingConfig(temperature=1.5)
    first = built.generate(["She was"] * 3, sampling, max_new_tokens=20, seeds=5)
    again = built.generate(["She was"] * 3, sampling, max_new_tokens=20, seeds=[7, 6, 5])
    assert [c.text for c in again] == [c.text for c in reversed(first)]
    assert len({c.text for c in first}) == 3


def test_several_continuations_read_the_prompt_once(count_read: list[int]) -> None:
    built = engine("MA", max_rows=4)
    ids = random_ids(30)[0]
    job = alone(built, Request(ids, SamplingConfig(temperature=1.0), 10, seeds=[3, 1, 2]))
    assert sum(count_read) == 30
    for seed, tokens in zip([3, 1, 2], tokens_of(job), strict=True):
        request = Request(ids, SamplingConfig(temperature=1.0), 10, seeds=[seed])
        assert tokens_of(alone(built, request)) == [tokens]


@pytest.mark.parametrize("pattern", ["MSWF", "AF"])
def test_tokens_fetched_in_strides_are_the_same(pattern: str) -> None:
    prompts = PROMPTS[:4]
    one = engine(pattern, sync_every=1)
    sampling = SamplingConfig(temperature=1.0, frequency_penalty=0.3, stop=["e"])
    expected = one.generate(prompts, sampling, max_new_tokens=23)
    expected += one.generate(prompts, GREEDY, max_new_tokens=23)
    strided = engine(pattern, sync_every=7)
    found = strided.generate(prompts, sampling, max_new_tokens=23)
    found += strided.generate(prompts, GREEDY, max_new_tokens=23)
    assert [(c.text, c.token_ids, c.finish_reason) for c in found] == [
        (c.text, c.token_ids, c.finish_reason) for c in expected
    ]
    assert len({len(c.token_ids) for c in found}) > 2


def state_bytes(pattern: str, length: int) -> int:
    job = alone(engine(pattern), Request(random_ids(length)[0], max_new_tokens=0, keep_state=True))
    assert job.state is not None
    return job.state.nbytes


@pytest.mark.parametrize("pattern", helpers.CONSTANT)
def test_state_size_does_not_depend_on_the_context(pattern: str) -> None:
    assert state_bytes(pattern, 3) == state_bytes(pattern, 300) > 0


def test_full_attention_remembers_every_token() -> None:
    assert state_bytes("AF", 300) > state_bytes("AF", 3)


def step_flops(built: Engine, length: int) -> int:
    job = alone(built, Request(random_ids(length)[0], max_new_tokens=0, keep_state=True))
    assert job.state is not None
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        built.model.step(torch.tensor([5]), job.state)
    return counter.get_total_flops()


@pytest.mark.parametrize("pattern", helpers.CONSTANT)
def test_a_steps_work_does_not_depend_on_the_context(pattern: str) -> None:
    built = engine(pattern)
    assert step_flops(built, 10) == step_flops(built, 400) > 0


@pytest.mark.parametrize("pattern", ["MSWF", "AF"])
def test_rows_that_end_leave_the_batch(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine(pattern)
    free = built.generate(PROMPTS[:4], GREEDY, max_new_tokens=20)
    # Something that row 1 comes to after some steps, and no other row does.
    stop = next(
        part
        for size in range(2, 12)
        for start in range(8, 24)
        if free[1].text.find(part := free[1].text[start : start + size]) == start
        and all(part not in free[i].text for i in (0, 2, 3))
    )
    sizes: list[int] = []
    launch = type(built.batch).launch
    monkeypatch.setattr(
        type(built.batch),
        "launch",
        lambda self, count: (sizes.append(len(self)), launch(self, count))[1],
    )
    sampling = SamplingConfig(temperature=0.0, stop=[stop])
    found = built.generate(PROMPTS[:4], sampling, max_new_tokens=20)
    assert found[1].finish_reason == "stop"
    assert found[1].text == free[1].text[: free[1].text.index(stop)]
    for i in (0, 2, 3):
        assert found[i].text == free[i].text
    assert sum(sizes) == sum(len(c.token_ids) + (c.finish_reason == "eos") - 1 for c in found)
    assert sizes[0] == 4
    assert sizes[-1] < 4


def test_a_long_prompt_delays_neither_rows_nor_prompts_behind_it() -> None:
    built = engine("MM", chunk=8)
    running = built.submit(Request(random_ids(5)[0], GREEDY, 200, ignore_eos=True))
    built.advance()
    long = built.submit(Request(random_ids(400)[0], GREEDY, 2))
    short = built.submit(Request(random_ids(12)[0], GREEDY, 2))
    while not short.done:
        before = built.stats.prompt_tokens, len(running.rows[0].token_ids)
        built.advance()
        assert built.stats.prompt_tokens - before[0] <= 8
        assert len(running.rows[0].token_ids) == before[1] + 1
    assert 0 < long.position < 60
    assert not long.rows[0].token_ids
    built.run([long, running])


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_rows_wait_for_room(pattern: str) -> None:
    built = engine(pattern, max_rows=3)
    jobs = [
        built.submit(Request(ids, GREEDY, 6, seeds=range(1 + i % 3)))
        for i, ids in enumerate(random_ids(*range(4, 16)))
    ]
    while not built.idle:
        built.advance()
        assert len(built.batch) <= 3
    assert all(job.done for job in jobs)
    assert all(len({*map(tuple, tokens_of(job))}) == 1 for job in jobs)


@pytest.mark.parametrize("pattern", ["MSWF", "MA"])
def test_a_crowd_of_unequal_prompts_is_read_in_few_passes(
    pattern: str, count_read: list[int]
) -> None:
    built = engine(pattern, dtype=torch.float64, chunk=512)
    prompts = random_ids(*range(20, 100, 5))
    requests = [Request(ids, GREEDY, 6, logprobs=0) for ids in prompts]
    expected = [alone(built, request) for request in requests]
    assert len(count_read) == len(prompts)
    count_read.clear()
    built._prefill._together = True  # as on a GPU
    jobs = [built.submit(request) for request in requests]
    built.run(jobs)
    read = sum(map(len, prompts))
    if built.batch.grows:
        assert sum(count_read) == read
        assert len(count_read) <= 10
    else:  # whole, the shorter behind something else
        assert read < sum(count_read) <= 2 * read
        assert len(count_read) <= 4
    assert built.stats.prompt_tokens == 2 * read
    for job, single in zip(jobs, expected, strict=True):
        assert tokens_of(job) == tokens_of(single)
        for mine, theirs in zip(job.rows[0].logprobs, single.rows[0].logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-9)


def test_the_separator_ends_a_text() -> None:
    built = engine("MM")
    with torch.no_grad():
        head = built.model.lm_head.weight
        head[built.tokenizer.eos_id] = head[: built.model.vocab_size].mean(dim=0)
    sampling = SamplingConfig(temperature=30.0)
    found = built.generate([""] * 40, sampling, max_new_tokens=400, seeds=0)
    ended = [c for c in found if c.finish_reason == "eos"]
    assert len(ended) >= 5
    for completion in ended:
        assert len(completion.token_ids) < 400
        assert built.tokenizer.eos_id not in completion.token_ids
        assert completion.text == built.tokenizer.decode(completion.token_ids)


def test_padded_ids_are_never_drawn() -> None:
    built = engine("MM")
    model = built.model
    assert model.lm_head.weight.shape[0] == 512 > model.vocab_size == 500
    with torch.no_grad():
        model.lm_head.weight[500:] = 1e4
    sampling = SamplingConfig(temperature=50.0)
    found = built.generate(["She was"] * 20, sampling, max_new_tokens=40)
    ids = [token for completion in found for token in completion.token_ids]
    assert max(ids) < 500
    assert len(set(ids)) > 200


def test_a_stop_string_across_tokens_is_cut() -> None:
    built = engine("MA")
    sampling = SamplingConfig(temperature=1.0)
    decode = built.tokenizer.decode
    for seed in range(100):
        (free,) = built.generate(["She was"], sampling, max_new_tokens=30, seeds=seed)
        # The last character of the ninth token's text and the first of the tenth's.
        end = len(decode(free.token_ids[:9]))
        stop = free.text[end - 1 : end + 1]
        if len(stop) == 2 and "\ufffd" not in stop and free.text.index(stop) == end - 1:
            break
    sampling.stop = ["never in it", stop]
    (found,) = built.generate(["She was"], sampling, max_new_tokens=30, seeds=seed)
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)]
    assert found.token_ids == free.token_ids[:10]
    assert stop in decode(found.token_ids)


@pytest.mark.parametrize("pattern", ["SS", "MA"])
@pytest.mark.parametrize("stops", [[], ["e"], [" th", "ing", "zzz"]])
def test_streamed_pieces_join_to_the_whole_text(pattern: str, stops: list[str]) -> None:
    built = engine(pattern)
    for seed in range(4):
        sampling = SamplingConfig(temperature=1.0, stop=stops)
        pieces = list(built.stream("Emma", sampling, max_new_tokens=40, seed=seed))
        (whole,) = built.generate(["Emma"], sampling, max_new_tokens=40, seeds=seed)
        assert "".join(pieces) == whole.text
        if not stops:
            assert len(pieces) > 10
        assert all(stop not in whole.text for stop in stops)


def test_no_new_tokens_is_an_empty_text() -> None:
    (found,) = engine("MM").generate(["She was"], max_new_tokens=0)
    assert (found.text, found.token_ids, found.finish_reason) == ("", [], "length")
    assert list(engine("MM").stream("She was", max_new_tokens=0)) == []


def test_times_are_measured() -> None:
    found = engine("MM").generate(PROMPTS, max_new_tokens=10)
    for completion in found:
        assert completion.prefill_seconds > 0
        assert completion.decode_seconds > 0


@pytest.mark.parametrize("stage", ["waiting", "reading", "running"])
def test_a_cancelled_request_frees_its_rows(stage: str) -> None:
    built = engine("MA", chunk=8, max_rows=4)
    ids = random_ids(20, 30)
    other = Request(ids[0], GREEDY, 20, ignore_eos=True)
    expected = tokens_of(alone(built, other))
    events: list[Event] = []
    jobs = [built.submit(other)]
    blocking = Request(ids[1], GREEDY, 50, seeds=[0, 1, 2], ignore_eos=True)
    if stage == "waiting":
        jobs.append(built.submit(blocking))
    gone = built.submit(blocking, events.append)
    reached: dict[str, Callable[[], bool]] = {
        "waiting": lambda: built.waiting == 1 and len(built.batch) == 4,
        "reading": lambda: 0 < gone.position < 30,
        "running": lambda: len(gone.rows[0].token_ids) > 3,
    }
    while not reached[stage]():
        built.advance()
    built.cancel(gone)
    assert [(event.row, event.finish_reason) for event in events[-3:]] == [
        (i, "interrupted") for i in range(3)
    ]
    told = len(events)
    built.run(jobs)
    built.cancel(gone)
    assert len(events) == told
    assert built.idle
    assert tokens_of(jobs[0]) == expected
    texts = ["".join(event.text for event in events if event.row == i) for i in range(3)]
    assert texts == [completion.text for completion in gone.completions()]


def test_a_failed_request_frees_its_rows_and_disturbs_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MA", chunk=8, max_rows=6)
    good = [Request(ids, GREEDY, 25) for ids in random_ids(20, 9)]
    expected = [tokens_of(alone(built, request)) for request in good]
    with torch.no_grad():
        built.model.embedding.weight[499] = torch.nan
        built.model.lm_head.weight[499] = 0.0
    forward = LanguageModel.forward

    def choosy(self: LanguageModel, input_ids: Tensor, *args: object, **kw: object) -> object:
        if 498 in input_ids:
            raise RuntimeError("the id 498 is too much")
        return forward(self, input_ids, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "forward", choosy)
    events: list[Event] = []
    jobs = [built.submit(request) for request in good]
    raising = built.submit(Request([5] * 11 + [498, 6], GREEDY, 5), events.append)
    poisoned = built.submit(Request([5, 499, 6], GREEDY, 5, seeds=[0, 1]), events.append)
    built.run([*jobs, raising, poisoned])
    # A row in the place that the poisoned ones had.
    jobs += [built.submit(request) for request in good]
    built.run(jobs)
    assert [tokens_of(job) for job in jobs] == expected * 2
    assert built.idle
    with pytest.raises(RuntimeError, match="498 is too much"):
        raising.completions()
    with pytest.raises(RuntimeError, match="not finite"):
        poisoned.completions()
    assert [event.job for event in events if event.job.error] == [poisoned, raising]
    assert built.stats.finished["error"] == 2


def test_an_error_within_a_step_ends_the_batch_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MM", chunk=8)
    ids = random_ids(5, 40)
    expected = tokens_of(alone(built, Request(ids[1], GREEDY, 8)))
    lost = built.submit(Request(ids[0], GREEDY, 20, ignore_eos=True))
    built.advance()
    later = built.submit(Request(ids[1], GREEDY, 8))

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "step", broken)
        built.advance()
    assert isinstance(lost.error, RuntimeError)
    built.run([later])
    assert tokens_of(later) == expected
    assert built.idle


def test_a_row_that_memory_cannot_hold_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine("MA")
    ids = random_ids(10, 30)
    expected = tokens_of(alone(built, Request(ids[0], GREEDY, 80, ignore_eos=True)))
    short = built.submit(Request(ids[0], GREEDY, 80, ignore_eos=True))
    long = built.submit(Request(ids[1], GREEDY, 400, ignore_eos=True))
    reserve = LanguageModel.reserve

    def limited(self: LanguageModel, state: ModelState, tokens: int) -> ModelState:
        if tokens > 128:
            raise MemoryError("no more than 128 slots")
        return reserve(self, state, tokens)

    monkeypatch.setattr(LanguageModel, "reserve", limited)
    built.run([short, long])
    assert tokens_of(short) == expected
    assert isinstance(long.error, MemoryError)
    assert len(long.rows[0].token_ids) > 90
    assert built.idle


def test_large_caches_are_given_back() -> None:
    built = engine("MA", chunk=4096)
    alone(built, Request(random_ids(9000)[0], GREEDY, 2))
    assert built.batch.nbytes == 0
    alone(built, Request(random_ids(9)[0], GREEDY, 2))
    assert 0 < built.batch.nbytes < 1 << 20


@pytest.mark.parametrize("pattern", ["MM", "MSWF", "MA"])
def test_bfloat16_states_stay_near(pattern: str) -> None:
    exact, halved = engine(pattern), engine(pattern, state_dtype="bfloat16")
    request = Request(random_ids(60)[0], GREEDY, 12, logprobs=0, ignore_eos=True, keep_state=True)
    expected, found = alone(exact, request), alone(halved, request)
    assert found.state is not None
    for layer in found.state.layers:
        assert all(t.dtype in (torch.float32, torch.int64) for t in layer.tensors.values())
    differences = [
        abs(a.logprob - b.logprob)
        for a, b in zip(expected.rows[0].logprobs[:3], found.rows[0].logprobs[:3], strict=True)
        if a.token_id == b.token_id
    ]
    assert differences[0] == 0  # drawn from the prompt's own state
    assert 0 < max(differences) < 1.0


def random_request(rng: random.Random) -> Request:
    choices = {
        "temperature": [0.0, 0.7, 1.3],
        "top_k": [0, 0, 7],
        "top_p": [1.0, 0.8],
        "min_p": [0.0, 0.05],
        "typical_p": [1.0, 1.0, 0.7],
        "repetition_penalty": [1.0, 1.3],
        "presence_penalty": [0.0, 0.5],
    }
    sampling = SamplingConfig(
        **{name: rng.choice(values) for name, values in choices.items()},
        stop=rng.sample([" th", "e", "ing", "qu"], rng.choice([0, 0, 1, 2])),
    )
    (ids,) = random_ids(int(rng.expovariate(1 / 12)) + 1, seed=rng.randint(0, 10**9))
    return Request(
        ids,
        sampling,
        max_new_tokens=rng.randint(0, 14),
        seeds=[rng.randint(0, 10**9) for _ in range(rng.choice([1, 1, 1, 2]))],
        logprobs=rng.choice([None, None, 0, 2]),
        stream=rng.random() < 0.5,
        keep_state=rng.random() < 0.2,
    )


def states_alive() -> int:
    gc.collect()
    return sum(type(thing) in (ModelState, Rows) for thing in gc.get_objects())


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("pattern", "overlapped", "together"),
    [("MA", False, False), ("MA", True, False), ("MS", True, True)],
)
def test_random_requests_are_what_each_is_alone(
    count: int, pattern: str, overlapped: bool, together: bool
) -> None:
    rng = random.Random(7)
    dtype, chunk = (torch.float64, 256) if together else (torch.float32, 16)
    built = engine(pattern, dtype=dtype, chunk=chunk, max_rows=12, sync_every=3)
    # As on a GPU: steps go on before their tokens are looked at, prompts are read together.
    built._overlap = overlapped
    built._prefill._together = together
    alone(built, Request([1, 2], GREEDY, 2))  # what is kept for good
    before = states_alive()
    requests = [random_request(rng) for _ in range(count)]
    jobs: list[Job] = []
    cancelled: set[Job] = set()
    for request in requests:
        jobs.append(built.submit(request))
        for _ in range(rng.choice([0, 1, 2])):
            built.advance()
        if rng.random() < 0.3:
            gone = rng.choice(jobs[-10:])
            if not gone.done:
                built.cancel(gone)
                cancelled.add(gone)
    built.run(jobs)
    assert built.idle
    assert count / 25 < len(cancelled) < count / 2
    for request, job in zip(requests, jobs, strict=True):
        single = alone(built, request)
        for mine, theirs in zip(single.completions(), job.completions(), strict=True):
            if job in cancelled:
                assert mine.token_ids[: len(theirs.token_ids)] == theirs.token_ids
            else:
                assert mine.token_ids == theirs.token_ids
                assert mine.text == theirs.text
                assert mine.finish_reason == theirs.finish_reason
    largest = built.batch.nbytes
    assert largest < 12 * 2 * state_bytes(pattern, 128) * dtype.itemsize // 4
    del jobs, requests, job, request, single, gone, cancelled
    built.batch.clear()
    assert states_alive() <= before


def test_nothing_is_left_on_its_way_when_all_rows_stop_at_once() -> None:
    built = engine("MM", sync_every=1)
    prompt = built.prompt_ids(PROMPTS[0])
    drawn = tokens_of(alone(built, Request(prompt, GREEDY, 6)))[0]
    built._overlap = True
    sampling = SamplingConfig(temperature=0.0, stop_token_ids=[drawn[3]])
    job = alone(built, Request(prompt, sampling, 6, [0, 1]))
    assert tokens_of(job) == [drawn[: drawn.index(drawn[3])]] * 2


@pytest.mark.parametrize("stops", [[], ["e the"]])
def test_only_a_stream_is_told_of_every_stride(stops: list[str]) -> None:
    built = engine("MM", sync_every=2)
    prompt, heard = built.prompt_ids(PROMPTS[0]), {}
    for stream in (True, False):
        events: list[Event] = []
        sampling = SamplingConfig(temperature=1.0, stop=stops)
        request = Request(prompt, sampling, 21, [5], logprobs=0, stream=stream)
        job = built.submit(request, events.append)
        built.run([job])
        (row,) = job.rows
        assert "".join(event.text for event in events) == row.text
        assert sum(event.tokens for event in events) == len(row.token_ids)
        told = [logprob for event in events for logprob in event.logprobs]
        assert [logprob.token_id for logprob in told] == row.token_ids
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        heard[stream] = len(events), row.text, row.finish_reason
    assert heard[True][1:] == heard[False][1:]
    assert heard[True][0] > 5
    assert heard[False][0] == 2


def test_a_late_host_looks_less_often_and_streams_go_by_the_devices_pace() -> None:
    built = engine("MM", sync_every=16)
    ids = random_ids(5)[0]
    job = built.submit(Request(ids, GREEDY, 100, ignore_eos=True))
    strides: list[int] = []
    launch = built.batch.launch

    def launched(count: int = 1) -> Flight:
        strides.append(count)
        return launch(count)

    built.batch.launch = launched  # type: ignore[method-assign]
    built._pace.late = 0.0
    built.advance()
    # On a CPU nothing is left to wait for.
    for _ in range(4):
        assert 0 < built._pace.late < 0.5
        built.advance()
    built._pace.late = 0.6
    built.advance()
    assert strides == [8, 8, 8, 8, 8, 16]
    built.submit(Request(ids, GREEDY, 100, ignore_eos=True, stream=True))
    built._pace.step_seconds = 0.004
    built.advance()
    assert strides[-1] == 2
    assert 0 < built._pace.step_seconds < 0.5
    built.cancel(job)


def test_processes_that_share_a_model_take_the_same_strides() -> None:
    pace = Pace(16, steady=True)
    flight = Flight([Drawn(torch.zeros(1), None, None, None)] * 2, [], began=0.0)
    pace.heard(flight, 0.0)
    assert pace.steps(100, streamed=True) == 8
    pace = Pace(16)
    pace.heard(flight, 0.0)
    assert pace.steps(100, streamed=True) == 1  # it began long ago


def test_a_reply_for_the_cache_is_not_read_beyond_its_end() -> None:
    built = engine("MM", sync_every=4, state_cache_bytes=1 << 20)
    built._overlap = True
    prompt = built.prompt_ids(PROMPTS[0])
    job = alone(built, Request(prompt, GREEDY, 9, ignore_eos=True, cache_reply=True))
    following = [*prompt, *tokens_of(job)[0], 7]
    again = alone(built, Request(following, GREEDY, 5))
    assert again.cached_tokens == len(prompt) + 8
    assert tokens_of(again) == tokens_of(alone(engine("MM"), Request(following, GREEDY, 5)))


def test_misuse_is_refused() -> None:
    built = engine("MM", max_rows=3)
    with pytest.raises(ConfigError, match=r"^max_new_tokens=-1: "):
        built.generate(["a"], max_new_tokens=-1)
    with pytest.raises(ConfigError, match=r"^sampling\.top_p=2"):
        built.stream("a", SamplingConfig(top_p=2), max_new_tokens=1)
    with pytest.raises(ValueError, match="expected 2, one a row"):
        built.generate(["a", "b"], max_new_tokens=1, seeds=[1])
    with pytest.raises(ConfigError, match=r"^prompt=\[\]: is empty"):
        built.submit(Request([]))
    with pytest.raises(ConfigError, match=r"^prompt=500: is no token; ids go from 0 to 499"):
        built.submit(Request([3, 500]))
    with pytest.raises(ConfigError, match=r"^seeds=4: a request has at least 1 and at most 3"):
        built.submit(Request([3], seeds=range(4)))
    with pytest.raises(ConfigError, match=r"^logprobs=21: must be from 0 to 20"):
        built.submit(Request([3], logprobs=21))
    assert built.idle
    for key, value in {"prefill_chunk": 0, "max_rows": 0, "sync_every": 0}.items():
        with pytest.raises(ConfigError, match=rf"^{key}=0: must be ≥ 1"):
            Engine(built.model, built.tokenizer, **{key: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^state_dtype='bfloat': .*Did you mean 'bfloat16'"):
        engine("MM", state_dtype="bfloat")


def test_a_cancelled_reply_that_was_read_too_far_is_not_cached() -> None:
    built = engine("MM", sync_every=4, max_rows=12, state_cache_bytes=1 << 20)
    built._overlap = True
    prompts = random_ids(*range(10, 20))
    jobs = [
        built.submit(Request(ids, GREEDY, 40, ignore_eos=True, cache_reply=True)) for ids in prompts
    ]
    for _ in range(3):
        built.advance()
    assert built._flights  # steps whose tokens are not known
    gone = jobs[3]
    built.cancel(gone)
    (drawn,) = tokens_of(gone)
    assert 0 < len(drawn) < 40
    following = [*prompts[3], *drawn[:-1], 7, 8]
    built.run(jobs)
    again = alone(built, Request(following, GREEDY, 12, ignore_eos=True))
    assert again.cached_tokens == len(prompts[3])
    fresh = alone(engine("MM"), Request(following, GREEDY, 12, ignore_eos=True))
    assert tokens_of(again) == tokens_of(fresh)


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one() -> None:
    built = engine("MM", dtype=torch.float64, chunk=256, max_rows=8)
    built._prefill._together = True
    long = built.submit(Request(random_ids(600)[0], GREEDY, 1))
    rounds = 0
    while not long.done and rounds < 40:
        # Each fills a round's tokens: no other prompt fits beside it.
        built.submit(Request(random_ids(200, seed=rounds)[0], GREEDY, 1))
        built.advance()
        rounds += 1
    assert rounds == 12  # three chunks, every fourth pass
    built.run([long])


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_no_memory_for_a_cached_state_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = engine("MM", state_cache_bytes=1 << 20)
    request = Request(random_ids(12)[0], GREEDY, 5, ignore_eos=True, cache_reply=True)
    expected = tokens_of(alone(engine("MM"), request))
    monkeypatch.setattr(Read, "alone", out_of_memory)
    monkeypatch.setattr(built.batch, "state_of", out_of_memory)
    job = alone(built, request)
    assert tokens_of(job) == expected
    assert len(built.cache) == 0
    assert "there is no memory to cache a prompt's state in" in caplog.text
    assert "there is no memory to cache a reply's state in" in caplog.text


def test_no_memory_for_a_state_that_was_asked_for_fails_that_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MM")
    ids, others = random_ids(12, 9)
    kept = built.submit(Request(ids, GREEDY, 3, ignore_eos=True, keep_state=True))
    other = built.submit(Request(others, GREEDY, 8, ignore_eos=True))
    monkeypatch.setattr(built.batch, "state_of", out_of_memory)
    built.run([kept, other])
    assert isinstance(kept.error, torch.OutOfMemoryError)
    assert kept.state is None
    assert tokens_of(other) == tokens_of(
        alone(engine("MM"), Request(others, GREEDY, 8, ignore_eos=True))
    )
    assert built.idle
    cancelled = built.submit(Request(ids, GREEDY, 30, ignore_eos=True, keep_state=True))
    while not cancelled.rows[0].token_ids:
        built.advance()
    built.cancel(cancelled)
    assert isinstance(cancelled.error, torch.OutOfMemoryError)
    assert built.idle


def test_a_chunk_that_fails_for_one_is_read_anew_from_where_each_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MM", dtype=torch.float64)
    built._prefill._together = True
    requests = [
        Request(ids, GREEDY, 4, ignore_eos=True, logprobs=0, prompt_logprobs=True)
        for ids in random_ids(20, 20)
    ]
    expected = [alone(engine("MM", dtype=torch.float64), request) for request in requests]
    jobs = [built.submit(request) for request in requests]
    score, failed = built._prefill._scores, [jobs[1]]

    def failing(job: Job, logits_lv: Tensor) -> list[TokenLogprob]:
        if job in failed:
            failed.remove(job)
            out_of_memory()
        return score(job, logits_lv)

    monkeypatch.setattr(built._prefill, "_scores", failing)
    built.run(jobs)
    assert not failed
    for mine, theirs in zip(jobs, expected, strict=True):
        assert tokens_of(mine) == tokens_of(theirs)
        assert [t.token_id for t in mine.prompt_logprobs] == mine.request.prompt_ids[1:]
        assert [t.logprob for t in mine.prompt_logprobs] == pytest.approx(
            [t.logprob for t in theirs.prompt_logprobs]
        )


def test_no_memory_to_read_prompts_together_leaves_each_to_be_read_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MM", dtype=torch.float64)
    built._prefill._together = True
    assert built._prefill._whole is not None
    monkeypatch.setattr(built._prefill._whole, "_make_room", out_of_memory)
    requests = [Request(ids, GREEDY, 4, ignore_eos=True) for ids in random_ids(20, 31, 70)]
    jobs = [built.submit(request) for request in requests]
    built.run(jobs)
    for job, request in zip(jobs, requests, strict=True):
        expected = alone(engine("MM", dtype=torch.float64), request)
        assert tokens_of(job) == tokens_of(expected)
    assert built.stats.prompt_tokens == 20 + 31 + 70
