from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.config import RecallEvalConfig
from eval.recall import answers, evaluate_recall, measure
from mamba2lm.data import IGNORED, RecallConfig, generate_recall
from mamba2lm.schema import ConfigError
from tests.inference import helpers

CONFIG = RecallEvalConfig(length=64, n_pairs=[2, 8, 16], n_examples=37, batch_size=5)


def scan(ids_bl: Tensor, asked_bl: Tensor, known: int) -> Tensor:
    """Answer from the row's first ``known`` pairs, and with 0, which is no value, otherwise."""
    found = []
    for ids, asked in zip(ids_bl.tolist(), asked_bl.tolist(), strict=True):
        pairs = dict(zip(ids[0 : 2 * known : 2], ids[1 : 2 * known : 2], strict=True))
        found += [pairs.get(token, 0) for token, here in zip(ids, asked, strict=True) if here]
    return torch.tensor(found)


@pytest.mark.parametrize("n_pairs", CONFIG.n_pairs)
def test_an_oracle_answers_everything_and_half_of_one_half(n_pairs: int) -> None:
    for known in (n_pairs, n_pairs // 2):
        result = measure(
            lambda ids, asked, known=known: scan(ids, asked, known),
            CONFIG,
            n_pairs=n_pairs,
            vocab_size=100,
            seed=1,
        )
        assert (result.examples, result.questions) == (37, 37 * n_pairs)
        assert result.correct == 37 * known
        assert result.accuracy == known / n_pairs
        assert (result.length, result.vocab_size) == (64, 100)


def test_a_wrong_answer_is_wrong() -> None:
    result = measure(
        lambda ids, asked: scan(ids, asked, 8) + 1, CONFIG, n_pairs=8, vocab_size=100, seed=1
    )
    assert result.correct == 0


@pytest.mark.parametrize("pattern", ["MM", "SS", "AF"])
def test_answers_are_the_argmax_where_asked(pattern: str) -> None:
    model = helpers.model(pattern)
    task = RecallConfig(vocab_size=500, length=32, n_pairs=4)
    ids_bl, labels_bl = generate_recall(9, task, seed=2)
    asked_bl = labels_bl != IGNORED
    with torch.inference_mode():
        before = model(ids_bl).logits
        found = answers(model, ids_bl, asked_bl)
        after = model(ids_bl).logits
    assert before is not None
    assert after is not None
    assert found.tolist() == before.argmax(dim=-1)[asked_bl].tolist()
    assert len(set(found.tolist())) > 5
    assert torch.equal(before, after), "the hook stayed"


def test_a_models_accuracy_is_its_share_of_right_answers() -> None:
    # Twenty ids leave chance a good share: right answers do occur.
    model = helpers.model("MM", vocab_size=20)
    config = RecallEvalConfig(length=32, n_pairs=[2, 8], n_examples=50, batch_size=7)
    config.validate()
    results = evaluate_recall(model, config, seed=4)
    for n_pairs, result in zip([2, 8], results, strict=True):
        task = RecallConfig(vocab_size=20, length=32, n_pairs=n_pairs)
        ids_bl, labels_bl = generate_recall(50, task, seed=4)
        with torch.inference_mode():
            logits = model(ids_bl).logits
        assert logits is not None
        right = (logits.argmax(dim=-1) == labels_bl).sum().item()
        assert result.n_pairs == n_pairs
        assert result.correct == right > 0
        assert result.questions == 50 * n_pairs


def test_the_vocabulary_fits_the_model() -> None:
    config = RecallEvalConfig()
    assert config.task(4, 501).vocab_size == 500
    assert config.task(4, 50_277).vocab_size == 8192
    with pytest.raises(ConfigError, match=r"^recall\.vocab_size=600: the model has 500 ids"):
        evaluate_recall(helpers.model("MM"), RecallEvalConfig(vocab_size=600), seed=0)
    with pytest.raises(ConfigError, match=r"^recall\.vocab_size=20: it has 9 keys for 16 pairs"):
        evaluate_recall(helpers.model("MM", vocab_size=20), RecallEvalConfig(n_pairs=[16]), seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RecallEvalConfig(n_pairs=[4, 65]), r"^recall\.n_pairs=65: .* use 1 to 64 for length 256"),
        (RecallEvalConfig(n_pairs=[]), r"^recall\.n_pairs=\[\]: is empty"),
        (RecallEvalConfig(n_examples=0), r"^recall\.n_examples=0: must be ≥ 1"),
        (RecallEvalConfig(length=33, n_pairs=[4]), r"^recall\.length=33: use an even number"),
    ],
)
def test_values_out_of_range_are_named(config: RecallEvalConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate()
