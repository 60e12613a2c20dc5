"""Each task against its definition, on models and answers that can be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from eval.config import (
    Form,
    InductionEvalConfig,
    LastWordConfig,
    LengthConfig,
    PasskeyConfig,
    PerplexityConfig,
    SelectiveCopyingEvalConfig,
    Window,
)
from eval.induction import evaluate_induction, evaluate_selective_copying
from eval.last_word import evaluate_last_word
from eval.length import evaluate_length
from eval.passkey import evaluate_passkey, question
from eval.perplexity import evaluate_perplexity
from eval.published import FIGURES, published
from eval.questions import count_right
from eval.reading import Reader
from mamba2lm.data import InductionConfig, Tokenizer, generate
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError
from tests.inference import helpers

DOCUMENTS = [helpers.corpus()[start : start + 900] for start in (0, 3000, 9000)]


def stream_of(documents: list[str]) -> list[int]:
    tokenizer = helpers.tokenizer()
    return [i for text in documents for i in [tokenizer.eos_id, *tokenizer.encode(text)]]


def losses_of(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Return −log p of each of ``ids[1:]`` by one plain forward."""
    with torch.inference_mode():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
    return -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@pytest.mark.parametrize("form", Form)
def test_length_is_the_loss_in_windows(form: Form) -> None:
    model = helpers.model("MSWF", dtype=torch.float64)
    texts = [text[:200] for text in DOCUMENTS]
    config = LengthConfig(length=10, multiples=[1, 4, 8, 4096], batch_size=5)
    result = evaluate_length(model, helpers.tokenizer(), texts, config, form=form, chunk=50)
    ids = stream_of(texts)
    tokens = (len(ids) - 1) // 80 * 80
    assert (result.tokens, result.length) == (tokens, 10)
    assert [w.multiple for w in result.windows] == [1, 4, 8]
    for window in result.windows:
        size = 10 * window.multiple
        assert (window.length, window.windows) == (size, tokens // size)
        parts = torch.stack(
            [losses_of(model, ids[start : start + size + 1]) for start in range(0, tokens, size)]
        )
        assert window.loss == pytest.approx(float(parts.mean()), rel=1e-9)
        assert window.last_loss == pytest.approx(float(parts[:, -10:].mean()), rel=1e-9)
        short = [losses_of(model, ids[i : i + 11]) for i in range(size - 10, tokens, size)]
        assert window.last_loss_short == pytest.approx(float(torch.cat(short).mean()), rel=1e-9)
    whole = losses_of(model, ids[: tokens + 1])
    assert result.carried_loss == pytest.approx(float(whole.mean()), rel=1e-9)
    assert result.carried_last_loss == pytest.approx(float(whole[-80:].mean()), rel=1e-9)


def test_multiples_that_do_not_divide_each_other_score_the_same_tokens() -> None:
    model = helpers.model("MM")
    config = LengthConfig(length=10, multiples=[2, 3, 97])
    texts = [text[:200] for text in DOCUMENTS]
    result = evaluate_length(model, helpers.tokenizer(), texts, config)
    ids = stream_of(texts)
    assert result.tokens == (len(ids) - 1) // 60 * 60
    assert [(w.multiple, w.windows) for w in result.windows] == [
        (2, result.tokens // 20), (3, result.tokens // 30),
    ]  # fmt: skip
    parts = [losses_of(model, ids[i : i + 31])[-10:] for i in range(0, result.tokens, 30)]
    assert result.windows[1].last_loss == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
    # Places 20 to 29 of a window of 30: the first ten of one of 20, or its last ten.
    short = [
        losses_of(model, ids[i // 20 * 20 : i // 20 * 20 + 21])[i % 20 : i % 20 + 10]
        for i in range(20, result.tokens, 30)
    ]
    expected = float(torch.cat(short).mean())
    assert result.windows[1].last_loss_short == pytest.approx(expected, rel=1e-5)


def test_length_without_a_constant_state_is_not_carried() -> None:
    config = LengthConfig(length=16, multiples=[1, 2])
    result = evaluate_length(helpers.model("MA"), helpers.tokenizer(), DOCUMENTS, config)
    assert result.carried_loss is None
    with pytest.raises(ConfigError, match=r"^length\.length=90000: the text has [\d,]+ tokens"):
        evaluate_length(
            helpers.model("MM"), helpers.tokenizer(), DOCUMENTS, LengthConfig(length=90000)
        )


@pytest.mark.parametrize("window", Window)
def test_loss_by_context_adds_up_and_is_where_it_says(window: Window) -> None:
    model = helpers.model("MM", dtype=torch.float64)
    config = PerplexityConfig(
        window=window, length=24, stride=8 if window.value == "strided" else None
    )
    [text] = DOCUMENTS[:1]
    results = [
        evaluate_perplexity(model, helpers.tokenizer(), [text], config, form=form) for form in Form
    ]
    assert results[0].nll == pytest.approx(results[1].nll, rel=1e-10)
    bins = results[0].by_context
    assert sum(part.nll for part in bins) == pytest.approx(results[0].nll, rel=1e-12)
    assert sum(part.tokens for part in bins) == results[0].tokens
    ids = stream_of([text])
    count = len(ids) - 1
    contexts = {
        Window.disjoint: [i % 24 + 1 for i in range(count)],
        Window.strided: [i + 1 if i < 24 else 17 + (i - 24) % 8 for i in range(count)],
        Window.streaming: [i + 1 for i in range(count)],
    }[window]
    for part in bins:
        assert part.tokens == sum(part.least <= c <= part.most for c in contexts)
    assert [(p.least, p.most) for p in bins[:4]] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    if window is Window.streaming:
        whole = losses_of(model, ids)
        assert bins[3].nll == pytest.approx(float(whole[4:8].sum()), rel=1e-9)


def copying_model(vocab_size: int = 16) -> LanguageModel:
    """Return a model with random weights over a small vocabulary: right by chance only."""
    return helpers.model("MS", vocab_size=vocab_size)


def test_induction_counts_right_answers_at_each_length() -> None:
    model = copying_model()
    config = InductionEvalConfig(lengths=[8, 50, 90], n_examples=40, batch_size=16)
    config.validate()
    results = evaluate_induction(model, config, seed=2, chunk=32)
    assert results == evaluate_induction(model, config, seed=2, form=Form.recurrent)
    for result in results:
        inputs, labels = generate(InductionConfig(length=result.length), 40, seed=2)
        with torch.inference_mode():
            right = model(inputs, last_only=True).logits[:, 0].argmax(dim=-1) == labels[:, -1]
        assert (result.questions, result.correct) == (40, int(right.sum()))
    assert sum(result.correct for result in results) > 0


def test_an_oracle_of_induction_is_right_at_two_to_the_twenty() -> None:
    task = InductionEvalConfig(preset="mamba", n_examples=3).task(2**20)

    def follow(ids_bl: torch.Tensor, places_bk: torch.Tensor) -> torch.Tensor:
        first_b1 = (ids_bl == 0).int().argmax(dim=1, keepdim=True)
        assert places_bk.tolist() == [[2**20 - 1]] * len(ids_bl)
        return ids_bl.gather(1, first_b1 + 1)

    assert count_right(follow, task, batch_size=2, seed=0) == 3


def test_long_examples_stream_through_a_small_state() -> None:
    model = copying_model()
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    config = InductionEvalConfig(lengths=[5000], n_examples=2)
    evaluate_induction(model, config, seed=0, chunk=512)
    assert max(lengths) == 512
    assert sum(lengths) == 5000


def test_growing_states_stop_at_their_longest_length() -> None:
    model = helpers.model("MA", vocab_size=16)
    config = InductionEvalConfig(lengths=[16, 64], n_examples=4, longest_growing=32)
    assert [r.length for r in evaluate_induction(model, config, seed=0)] == [16]
    with pytest.raises(ConfigError, match=r"^induction\.vocab_size=16: the model has 12 ids"):
        evaluate_induction(copying_model(12), config, seed=0)


def test_selective_copying_in_both_forms() -> None:
    config = SelectiveCopyingEvalConfig(length=60, n_tokens=5, n_examples=30)
    config.validate()
    found = evaluate_selective_copying(copying_model(), config, seed=1, chunk=16)
    assert found == evaluate_selective_copying(copying_model(), config, seed=1, form=Form.recurrent)
    assert (found.questions, found.length) == (150, 60)
    assert 0 < found.correct < 60  # chance is one in fourteen
    assert SelectiveCopyingEvalConfig(preset="mamba", length=60).task().length == 4096


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_is_hidden_where_it_should_be(depth: float) -> None:
    for tokenizer in (helpers.tokenizer(), Tokenizer.of_bytes()):
        length = 1400
        context, answer = question(tokenizer, "90210", length, depth)
        assert length - len(tokenizer.encode("The grass is green. ")) * 6 < len(context + answer)
        assert len(context) + len(answer) <= length
        assert context[0] == tokenizer.eos_id
        text = tokenizer.decode([*context[1:], *answer])
        assert text.endswith("What is the pass key? The pass key is 90210")
        assert tokenizer.decode(answer).strip() == "90210"
        before, after = text.split("The pass key is 90210. Remember it.")
        filler = [part.count("The grass is green.") for part in (before, after)]
        assert filler[0] == round(depth * sum(filler))
        assert sum(filler) >= 1


def test_passkeys_are_right_where_greedy_decoding_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PasskeyConfig(lengths=[250, 320], depths=[0.0, 1.0], n_examples=3)
    config.validate()
    tokenizer, model = helpers.tokenizer(), helpers.model("MM")
    asked = []

    def score(self: Reader, pairs: list, *, batch_size: int) -> list[tuple[float, bool]]:
        asked.extend(pairs)
        return [(-1.0, number != 1) for number in range(len(pairs))]

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "continuations", score)
        results = evaluate_passkey(model, tokenizer, config, seed=0)
    assert [(r.length, r.depth, r.correct) for r in results] == [
        (250, 0.0, 2), (250, 1.0, 2), (320, 0.0, 2), (320, 1.0, 2),
    ]  # fmt: skip
    keys = [tokenizer.decode(answer).strip() for _, answer in asked]
    assert len(set(keys)) > 9
    assert all(len(key) == 5 for key in keys)
    assert all(r.tokens <= r.length for r in results)
    real = [evaluate_passkey(model, tokenizer, config, seed=0, form=form) for form in Form]
    assert real[0] == real[1]
    with pytest.raises(ConfigError, match=r"^passkey\.lengths=20: the prompt alone has \d+ tokens"):
        evaluate_passkey(model, tokenizer, PasskeyConfig(lengths=[20]), seed=0)


@pytest.mark.parametrize("form", Form)
def test_last_words_by_definition(form: Form) -> None:
    model, tokenizer = helpers.model("MS", dtype=torch.float64), helpers.tokenizer()
    texts = ["She was not at home", "It is a truth universally acknowledged", "single", "an end"]
    config = LastWordConfig(sources=["x"], batch_size=2)
    found = evaluate_last_word(model, tokenizer, texts, config, form=form)
    nll = tokens = 0.0
    for text in (texts[0], texts[1], texts[3]):
        before, _, word = text.rpartition(" ")
        target = tokenizer.encode(" " + word)
        ids = [tokenizer.eos_id, *tokenizer.encode(before), *target]
        nll += float(losses_of(model, ids)[-len(target) :].sum())
        tokens += len(target)
    assert (found.documents, found.tokens) == (3, tokens)
    assert found.nll == pytest.approx(nll, rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(nll / 3), rel=1e-9)


def test_every_published_figure_belongs_to_a_preset() -> None:
    presets = {
        "recall": {"zoology", "based", "mamba2"}, "induction": {"mamba"},
        "selective_copying": {"mamba"}, "passkey": {"stuffed"}, "last_word": {"lambada"},
    }  # fmt: skip
    for figure in FIGURES:
        assert figure.preset in presets[figure.task]
        assert figure.value is not None or figure.remark
    assert published("recall", None) == []
    assert [f["value"] for f in published("selective_copying", "mamba")] == [0.183, 0.970, 0.998]


def test_benchmarks_of_text(shared_data: Path) -> None:
    folder = shared_data / "benchmarks"
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "gpt-neox-20b.json")
    model = helpers.model("MM", vocab_size=tokenizer.vocab_size)
    text = (folder / "wikitext-2-test.txt").read_text(encoding="utf-8")
    config = PerplexityConfig(length=256, max_tokens=600)
    found = evaluate_perplexity(model, tokenizer, [text], config)
    assert found.tokens == pytest.approx(600, abs=4)
    assert text.encode()[: found.bytes].decode() == tokenizer.decode(
        tokenizer.encode(text[:20_000])[: found.tokens]
    )
    strided = PerplexityConfig(length=256, max_tokens=600, stride=256, window=Window.strided)
    again = evaluate_perplexity(model, tokenizer, [text], strided)
    assert (again.nll, again.text_sha256) == (found.nll, found.text_sha256)
    with (folder / "lambada-test.jsonl").open(encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    assert len(passages) == 5153
    config = LastWordConfig(sources=["lambada"], max_documents=6)
    last = evaluate_last_word(model, tokenizer, passages, config)
    assert last.documents == 6
    assert last.nll / last.tokens > 1
