from __future__ import annotations

import hashlib
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eval.perplexity
from eval.config import PerplexityConfig, Window
from eval.perplexity import evaluate_perplexity, held_out_documents, tokenize, windows
from mamba2lm.data import IGNORED, DataConfig, DataKind, Tokenizer
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError, from_mapping
from tests.inference import helpers

DOCUMENTS = [helpers.corpus()[start : start + size] for start, size in
             [(0, 700), (1000, 40), (2000, 211), (5000, 1), (6000, 350), (7000, 2)]]  # fmt: skip


def bigram(probabilities: torch.Tensor) -> LanguageModel:
    """Return a model over bytes that predicts by the byte before alone, with these probabilities.

    Every embedding is one of the unit vectors, the blocks add nothing, and the norm only scales,
    so the head's columns are the logits.
    """
    config = from_mapping(
        type(helpers.model_config("F")),
        {"pattern": "F", "d_model": 257, "vocab_size": 257, "tie_embeddings": False,
         "norm_eps": 0.0, "mixers": {"F": {"type": "mlp", "d_ff": 4}}},
        "model",
    )  # fmt: skip
    model = LanguageModel(config)
    model.init_weights(0)
    with torch.no_grad():
        model.blocks[0].mixer.residual_weight().zero_()
        model.embedding.weight[:257] = torch.eye(257)
        # RMSNorm turns a unit vector of 257 channels into one of length sqrt(257).
        model.lm_head.weight[:257] = probabilities.log().T / math.sqrt(257)
    return model.eval()


@pytest.mark.parametrize("window", list(Window))
def test_figures_worked_by_hand(window: Window) -> None:
    # "ab" and "b é": p(a|sep) = 1/2, p(b|a) = 1/4; p(b|sep) = 1/8, p( |b) = 1/2, the two bytes of é
    # 1/16 each. NLL = (1 + 2 + 3 + 1 + 4 + 4) ln 2; 6 tokens, 6 bytes, 3 words.
    chance = torch.full((257, 257), 1e-6)
    first, second = "é".encode()
    chance[256, ord("a")], chance[ord("a"), ord("b")] = 1 / 2, 1 / 4
    chance[256, ord("b")], chance[ord("b"), ord(" ")] = 1 / 8, 1 / 2
    chance[ord(" "), first], chance[first, second] = 1 / 16, 1 / 16
    chance[:, 0] += 1 - chance.sum(dim=1)
    config = PerplexityConfig(window=window, length=2)
    found = evaluate_perplexity(bigram(chance), Tokenizer.of_bytes(), ["ab", "", "b é"], config)
    assert (found.documents, found.tokens, found.words, found.bytes) == (2, 6, 3, 6)
    assert found.nll == pytest.approx(15 * math.log(2), rel=1e-5)
    assert found.token_perplexity == pytest.approx(2 ** (15 / 6), rel=1e-5)
    assert found.word_perplexity == pytest.approx(2**5, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(15 / 6, rel=1e-5)
    assert found.window == window.value


def loss_at_every_token(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Return −log p of each of ``ids[1:]`` given those before it, by one plain forward."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]])).logits
    assert logits is not None
    log_p = logits[0].double().log_softmax(dim=-1)
    return -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def by_definition(model: LanguageModel, length: int, context: int | None) -> float:
    """Score each token by a forward of its own: the last ``context`` … ``length`` tokens."""
    total, tokenizer = 0.0, helpers.tokenizer()
    for text in DOCUMENTS:
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        if context is None:
            total += float(loss_at_every_token(model, ids).sum())
            continue
        stride = length - context
        for i in range(1, len(ids)):
            # The window that scores token i: the first that reaches it.
            window = max(math.ceil((i - length) / stride), 0)
            total += float(loss_at_every_token(model, ids[window * stride : i + 1])[-1])
    return total


@pytest.mark.parametrize(
    ("pattern", "window", "length", "stride"),
    [
        ("MM", Window.disjoint, 16, None),
        ("MSWF", Window.disjoint, 16, None),
        ("MA", Window.disjoint, 16, None),
        ("MM", Window.strided, 16, 5),
        ("MSWF", Window.strided, 7, None),
        ("MA", Window.strided, 16, 5),
        ("MA", Window.strided, 16, 16),
        ("MM", Window.streaming, 16, None),
        ("MSWF", Window.streaming, 16, None),
        ("SS", Window.streaming, 5, None),
    ],
)
def test_each_window_scores_as_it_says(
    pattern: str, window: Window, length: int, stride: int | None
) -> None:
    model = helpers.model(pattern, dtype=torch.float64)
    config = PerplexityConfig(window=window, length=length, stride=stride, batch_size=3)
    config.validate()
    found = evaluate_perplexity(model, helpers.tokenizer(), DOCUMENTS, config)
    steps = {Window.disjoint: length, Window.strided: stride or 3, Window.streaming: None}
    step = steps[window]
    expected = by_definition(model, length, None if step is None else length - step)
    assert found.nll == pytest.approx(expected, rel=1e-9)
    assert found.stride == step
    assert found.tokens == sum(len(helpers.tokenizer().encode(text)) for text in DOCUMENTS)
    assert found.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert found.words == sum(len(text.split()) for text in DOCUMENTS)
    assert found.documents == len(DOCUMENTS)


def test_more_context_is_no_other_text() -> None:
    model = helpers.model("MM")
    results = [
        evaluate_perplexity(
            model, helpers.tokenizer(), DOCUMENTS, PerplexityConfig(window=window, length=16)
        )
        for window in Window
    ]
    counts = {(r.documents, r.tokens, r.words, r.bytes, r.text_sha256) for r in results}
    assert len(counts) == 1
    assert len({round(r.nll, 3) for r in results}) == 3


def test_batching_changes_nothing() -> None:
    model = helpers.model("SS", dtype=torch.float64)
    for window in Window:
        sums = [
            evaluate_perplexity(
                model,
                helpers.tokenizer(),
                DOCUMENTS,
                PerplexityConfig(window=window, length=11, batch_size=size),
            ).nll
            for size in (1, 4, 100)
        ]
        assert sums == pytest.approx([sums[0]] * 3, rel=1e-10)


def test_windows_cover_every_token_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = list(range(rng.randint(2, 60)))
        length = rng.randint(1, 20)
        stride = rng.randint(1, length)
        scored: list[int] = []
        for span in windows(ids, length, stride):
            assert len(span.input_ids) == len(span.labels) <= length
            for i, label in enumerate(span.labels):
                if label != IGNORED:
                    # The token's own position in the text is its id: the one before is read.
                    assert span.input_ids[i] == label - 1
                    assert i >= length - stride or span.input_ids[0] == 0
                    scored.append(label)
        assert scored == ids[1:]


def test_a_limit_cuts_text_and_tokens_at_one_place() -> None:
    tokenizer = helpers.tokenizer()
    texts = ["She was — née Émile " * 30, "never reached"]
    whole = tokenizer.encode(texts[0])
    for limit in range(5, 45):
        ((text, ids),) = tokenize(texts, tokenizer, limit)
        assert texts[0].startswith(text)
        assert ids == tokenizer.encode(text)
        # At most the bytes of one character are given up.
        assert limit - 3 <= len(ids) <= limit + 3
    assert list(tokenize(texts, tokenizer, len(whole))) == [(texts[0], whole)]
    model = helpers.model("MM")
    found = evaluate_perplexity(
        model, tokenizer, iter(texts), PerplexityConfig(max_tokens=30, length=8)
    )
    ((text, ids),) = tokenize(texts, tokenizer, 30)
    assert (found.documents, found.tokens, found.bytes) == (1, len(ids), len(text.encode()))


def test_documents_are_encoded_in_groups_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = helpers.tokenizer()
    # Empty ones, and one of several pieces.
    texts = [*DOCUMENTS, "", helpers.corpus()[:150_000], "", *(text[5:70] for text in DOCUMENTS)]
    expected = [(text, tokenizer.encode(text)) for text in texts if text]
    for characters in (1, 400, 1 << 19):
        monkeypatch.setattr(eval.perplexity, "_GROUP_CHARACTERS", characters)
        assert list(tokenize(texts, tokenizer)) == expected
    assert list(tokenize([], tokenizer)) == []

    # What cannot be read says so where it is used, and whoever stops early leaves no thread.
    def broken() -> Iterator[str]:
        yield DOCUMENTS[0]
        raise ConfigError("data.sources[0]", "x", "cannot be read.")

    with pytest.raises(ConfigError, match=r"^data\.sources\[0\]='x': cannot be read"):
        list(tokenize(broken(), tokenizer))
    stopped = iter(tokenize(texts, tokenizer))
    next(stopped)
    assert any(thread.name.startswith("tokenize") for thread in threading.enumerate())
    stopped.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("tokenize") for thread in threading.enumerate())


def test_the_digest_tells_texts_and_their_boundaries_apart() -> None:
    model = helpers.model("MM")

    def digest(*texts: str) -> str:
        return evaluate_perplexity(
            model, helpers.tokenizer(), texts, PerplexityConfig()
        ).text_sha256

    assert digest("abc", "d") == digest("abc", "d")
    assert len({digest("abc", "d"), digest("ab", "cd"), digest("abcd"), digest("abc", "e")}) == 4
    expected = hashlib.sha256((3).to_bytes(8, "little") + b"abc").hexdigest()
    assert digest("abc") == expected


def test_streaming_with_full_attention_is_refused() -> None:
    config = PerplexityConfig(window=Window.streaming)
    with pytest.raises(ConfigError, match=r"^perplexity\.window='streaming': .*use strided"):
        evaluate_perplexity(helpers.model("MA"), helpers.tokenizer(), DOCUMENTS, config)


def test_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^perplexity\.sources="):
        evaluate_perplexity(helpers.model("MM"), helpers.tokenizer(), [""], PerplexityConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PerplexityConfig(length=0), r"^perplexity\.length=0: must be ≥ 1"),
        (PerplexityConfig(stride=4), r"^perplexity\.stride=4: means nothing with window=disjoint"),
        (
            PerplexityConfig(window=Window.strided, length=4, stride=5),
            r"^perplexity\.stride=5: must be at most perplexity\.length=4",
        ),
    ],
)
def test_values_out_of_range_are_named(config: PerplexityConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_held_out_text_is_the_end_of_the_runs_sources(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i} of the text.\n\n" for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(paragraphs), encoding="utf-8")
    (tmp_path / "b.txt").write_text("Something else.\n", encoding="utf-8")
    data = from_mapping(
        DataConfig,
        {"sources": [str(tmp_path / "a.txt")], "validation_fraction": 0.1,
         "cache_dir": str(tmp_path / "cache")},
        "data",
    )  # fmt: skip
    (held,) = held_out_documents(data)
    assert "".join(paragraphs).endswith(held)
    assert 0.08 < len(held) / len("".join(paragraphs)) < 0.12
    data.validation_sources = [str(tmp_path / "b.txt")]
    assert list(held_out_documents(data)) == ["Something else.\n"]
    data.validation_sources, data.validation_fraction = [], 0.0
    with pytest.raises(ConfigError, match="held no text out"):
        list(held_out_documents(data))
    data.kind = DataKind.recall
    with pytest.raises(ConfigError, match="no text of its own"):
        list(held_out_documents(data))
