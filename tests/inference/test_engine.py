from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mamba2lm.inference import Engine, SamplingConfig
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


def engine(pattern: str, *, dtype: torch.dtype = torch.float32, chunk: int = 2048) -> Engine:
    return Engine(helpers.model(pattern, dtype=dtype), helpers.tokenizer(), prefill_chunk=chunk)


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 500, (length,), generator=generator).tolist() for length in lengths]


def full_logits(model: LanguageModel, ids: list[int]) -> Tensor:
    """Return the logits (l, v) of one parallel forward without any state."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    assert logits is not None
    return logits[0]


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
def test_prefill_then_steps_give_the_full_forwards_logits(pattern: str) -> None:
    built = engine(pattern, dtype=torch.float64, chunk=5)
    (ids,) = random_ids(45)
    expected = full_logits(built.model, ids)
    logits, state = built.prefill([ids[:18]])
    torch.testing.assert_close(logits[0], expected[17], rtol=0, atol=1e-9)
    for position in range(18, 45):
        with torch.inference_mode():
            logits, state = built.model.step(torch.tensor([ids[position]]), state)
        torch.testing.assert_close(logits[0], expected[position], rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_rows_of_unequal_lengths_are_prefilled_exactly(pattern: str) -> None:
    built = engine(pattern, dtype=torch.float64, chunk=6)
    rows = random_ids(9, 1, 23, 9, 14)
    rows.append(list(rows[1]))
    more = random_ids(3, 11, 3, 1, 7, 3, seed=1)
    logits, state = built.prefill(rows)
    before = [tensor.clone() for layer in state.layers for tensor in layer.tensors.values()]
    continued, _ = built.prefill(more, state)
    for i, (ids, added) in enumerate(zip(rows, more, strict=True)):
        expected = full_logits(built.model, ids + added)
        torch.testing.assert_close(logits[i], expected[len(ids) - 1], rtol=0, atol=1e-9)
        torch.testing.assert_close(continued[i], expected[-1], rtol=0, atol=1e-9)
    after = [tensor for layer in state.layers for tensor in layer.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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
        (alone,) = built.generate([prompt], sampling, max_new_tokens=25, seeds=[seed])
        assert alone.token_ids == found.token_ids
        assert alone.text == found.text
        assert alone.finish_reason == found.finish_reason


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_a_seed_names_a_text(pattern: str) -> None:
    built = engine(pattern)
    sampling = SamplingConfig(temperature=1.5)
    first = built.generate(["She was"] * 3, sampling, max_new_tokens=20, seeds=5)
    again = built.generate(["She was"] * 3, sampling, max_new_tokens=20, seeds=[7, 6, 5])
    assert [c.text for c in again] == [c.text for c in reversed(first)]
    assert len({c.text for c in first}) == 3


def state_bytes(pattern: str, length: int) -> int:
    return engine(pattern).prefill(random_ids(length))[1].nbytes


@pytest.mark.parametrize("pattern", helpers.CONSTANT)
def test_state_size_does_not_depend_on_the_context(pattern: str) -> None:
    assert state_bytes(pattern, 3) == state_bytes(pattern, 300) > 0


def test_full_attention_remembers_every_token() -> None:
    assert state_bytes("AF", 300) > state_bytes("AF", 3)


def step_flops(built: Engine, state: ModelState) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        built.model.step(torch.tensor([5]), state)
    return counter.get_total_flops()


@pytest.mark.parametrize("pattern", helpers.CONSTANT)
def test_a_steps_work_does_not_depend_on_the_context(pattern: str) -> None:
    built = engine(pattern)
    short = step_flops(built, built.prefill(random_ids(10))[1])
    assert step_flops(built, built.prefill(random_ids(400))[1]) == short > 0


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
    step = LanguageModel.step

    def counted(self: LanguageModel, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        sizes.append(ids.shape[0])
        assert all(layer.batch in (0, ids.shape[0]) for layer in state.layers)
        return step(self, ids, state)

    monkeypatch.setattr(LanguageModel, "step", counted)
    sampling = SamplingConfig(temperature=0.0, stop=[stop])
    found = built.generate(PROMPTS[:4], sampling, max_new_tokens=20)
    assert found[1].finish_reason == "stop"
    assert found[1].text == free[1].text[: free[1].text.index(stop)]
    for i in (0, 2, 3):
        assert found[i].text == free[i].text
    assert sum(sizes) == sum(len(c.token_ids) + (c.finish_reason == "eos") - 1 for c in found)
    assert sizes[0] == 4
    assert sizes[-1] < 4


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
    (free,) = built.generate(["She was"], sampling, max_new_tokens=30, seeds=3)
    decode = built.tokenizer.decode
    # The last character of the ninth token's text and the first of the tenth's.
    end = len(decode(free.token_ids[:9]))
    stop = free.text[end - 1 : end + 1]
    assert len(stop) == 2
    sampling.stop = ["never in it", stop]
    (found,) = built.generate(["She was"], sampling, max_new_tokens=30, seeds=3)
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)]
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
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


def test_misuse_is_refused() -> None:
    built = engine("MM")
    with pytest.raises(ConfigError, match=r"^max_new_tokens=-1: "):
        built.generate(["a"], max_new_tokens=-1)
    with pytest.raises(ConfigError, match=r"^sampling\.top_p=2"):
        built.stream("a", SamplingConfig(top_p=2), max_new_tokens=1)
    with pytest.raises(ValueError, match="expected 2, one a row"):
        built.generate(["a", "b"], max_new_tokens=1, seeds=[1])
    with pytest.raises(ValueError, match=r"rows of \[2, 0\] tokens"):
        built.prefill([[1, 2], []])
