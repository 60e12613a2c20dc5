"""From a config to batches: the cache, the held-out part, and every way of sharing the samples."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mamba2lm.data import (
    IGNORED,
    Corpus,
    DataConfig,
    DataKind,
    RecallConfig,
    Tokenizer,
    TokenizerConfig,
    TokenizerKind,
    prepare_data,
    training_batches,
    validation_batches,
)
from mamba2lm.data.shards import TokenStore
from mamba2lm.data.sources import Source
from mamba2lm.schema import ConfigError, from_mapping
from tests.data.texts import prose

BYTES = TokenizerConfig(kind=TokenizerKind.bytes)


def write_texts(tmp_path: Path, name: str, texts: list[str]) -> str:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def config_for(tmp_path: Path, sources: list[Any], **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "sources": sources,
        "tokenizer": BYTES,
        "sequence_length": 32,
        "cache_dir": str(tmp_path / "cache"),
        **changes,
    }
    return DataConfig(**settings)


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    long = write_texts(tmp_path, "long", [prose(1, 600)])
    short = write_texts(tmp_path, "short", [prose(seed, 4) for seed in range(60)])
    return config_for(tmp_path, [long, {"path": short, "weight": 3}], validation_fraction=0.2)


def take(batches: Iterator[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    return list(islice(batches, count))


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return set(left) == set(right) and all(left[name].equal(right[name]) for name in left)


def text_of(corpus: Corpus, store: TokenStore) -> str:
    assert corpus.tokenizer is not None
    return corpus.tokenizer.decode(store.read(0, store.tokens).tolist())


def stores(corpus: Corpus) -> tuple[list[TokenStore], list[TokenStore]]:
    train = [packed.store for packed in corpus.train._packed]  # type: ignore[attr-defined]
    validation = corpus.validation._packed  # type: ignore[union-attr]
    return train, [packed.store for packed in validation]


def test_schema_is_one_that_omegaconf_composes() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(DataConfig),
        {"kind": "recall", "sources": ["a", {"path": "b"}], "tokenizer": {"kind": "bytes"}},
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, DataConfig)
    assert config.kind is DataKind.recall
    assert config.sources == ["a", {"path": "b"}]
    assert config.tokenizer.kind is TokenizerKind.bytes


@pytest.mark.parametrize("name", ["austen", "bytes", "recall", "local"])
def test_shipped_configs_fit_the_schema(name: str) -> None:
    file = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    loaded = OmegaConf.load(file)
    config = from_mapping(DataConfig, loaded, "data")  # type: ignore[arg-type]
    assert config.kind is (DataKind.recall if name == "recall" else DataKind.text)


def test_held_out_text_is_the_end_and_nothing_is_lost(tmp_path: Path) -> None:
    text = prose(1, 3000)
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare_data(config_for(tmp_path, [str(tmp_path / "a.txt")]), seed=0)
    (train,), (held_out,) = stores(corpus)
    assert text_of(corpus, train) + text_of(corpus, held_out) == text
    assert corpus.validation is not None
    assert corpus.validation.bytes / len(text) == pytest.approx(0.05, abs=0.01)
    assert corpus.validation.tokens == corpus.validation.bytes  # one separator, never a label
    assert corpus.train.describe() == {
        "sources": [str(tmp_path / "a.txt")],
        "documents": 1,
        "tokens": train.tokens,
        "bytes": len(text) - corpus.validation.bytes,
    }


def test_bpe_never_sees_what_is_held_out(tmp_path: Path) -> None:
    hidden = "QZXQZX " * 300
    (tmp_path / "a.txt").write_text(prose(1, 3000) + "\n" + hidden)
    tokenizer = TokenizerConfig(vocab_size=700)
    shown = config_for(tmp_path, [str(tmp_path / "a.txt")], tokenizer=tokenizer)
    half = dataclasses.replace(shown, validation_fraction=0.4)
    nothing = dataclasses.replace(shown, validation_fraction=0.0)
    blind, seeing = prepare_data(half, seed=0), prepare_data(nothing, seed=0)
    assert seeing.validation is None
    assert blind.tokenizer is not None
    assert seeing.tokenizer is not None
    assert len(seeing.tokenizer.encode(" QZXQZX")) == 1
    assert len(blind.tokenizer.encode(" QZXQZX")) == 7


def test_validation_sources_replace_the_held_out_part(tmp_path: Path) -> None:
    train = write_texts(tmp_path, "train", [prose(1, 500)])
    other = write_texts(tmp_path, "other", [prose(2, 90), prose(3, 50)])
    config = config_for(tmp_path, [train], validation_sources=[other])
    corpus = prepare_data(config, seed=0)
    (trained,), (validated,) = stores(corpus)
    assert text_of(corpus, trained) == prose(1, 500)
    assert text_of(corpus, validated) == prose(2, 90) + prose(3, 50)
    assert corpus.validation is not None
    # The second document's separator is a label too.
    assert corpus.validation.tokens == corpus.validation.bytes + 1


def test_second_start_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path, "a", [prose(1, 2000)])
    config = config_for(tmp_path, [source], tokenizer=TokenizerConfig(vocab_size=500))
    first = prepare_data(config, seed=0)

    def refuse(self: Source) -> list[str]:
        raise AssertionError("the source was read again")

    monkeypatch.setattr(Source, "documents", refuse)
    monkeypatch.setattr(Tokenizer, "train", refuse)
    second = prepare_data(config, seed=0)
    assert second.train.fingerprint == first.train.fingerprint
    assert same(second.train.sample(5), first.train.sample(5))
    with pytest.raises(AssertionError, match="read again"):
        prepare_data(dataclasses.replace(config, tokenizer=BYTES), seed=0)


def test_given_tokenizer_is_used(tmp_path: Path) -> None:
    source = write_texts(tmp_path, "a", [prose(1, 2000)])
    config = config_for(tmp_path, [source], tokenizer=TokenizerConfig(vocab_size=500))
    given = Tokenizer.train([prose(9, 100)], 300)
    corpus = prepare_data(config, seed=0, tokenizer=given)
    assert corpus.tokenizer is given
    assert corpus.vocab_size == given.vocab_size
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_main_works_before_the_barrier_and_others_after(tmp_path: Path) -> None:
    config = config_for(tmp_path, [write_texts(tmp_path, "a", [prose(1, 500)])])
    tokens = tmp_path / "cache" / "tokens"
    seen: list[bool] = []
    prepare_data(config, seed=0, is_main=True, wait=lambda: seen.append(tokens.exists()))
    assert seen == [True]

    other = dataclasses.replace(config, cache_dir=str(tmp_path / "other"))
    tokens = tmp_path / "other" / "tokens"
    prepare_data(other, seed=0, is_main=False, wait=lambda: seen.append(tokens.exists()))
    assert seen == [True, False]


def test_fingerprint_follows_what_decides_the_samples(mixture: DataConfig) -> None:
    fingerprints = {
        prepare_data(config, seed=seed).train.fingerprint
        for config, seed in [
            (mixture, 0),
            (mixture, 1),
            (dataclasses.replace(mixture, sequence_length=16), 0),
            (dataclasses.replace(mixture, reset_at_documents=False), 0),
            (dataclasses.replace(mixture, sources=mixture.sources[:1]), 0),
        ]
    }
    assert len(fingerprints) == 5
    assert prepare_data(mixture, seed=0).train.fingerprint in fingerprints


@pytest.mark.parametrize("kind", list(DataKind))
def test_any_number_of_processes_sees_the_same_samples(mixture: DataConfig, kind: DataKind) -> None:
    task = RecallConfig(vocab_size=64, length=16, n_pairs=3, n_train=300, n_test=5)
    config = dataclasses.replace(mixture, kind=kind, recall=task)
    samples = prepare_data(config, seed=4).train
    alone = take(training_batches(samples, start=16, micro_batch=8), 12)
    for world_size in (2, 4):
        micro_batch = 8 // world_size
        ranks = [
            take(
                training_batches(
                    samples,
                    start=16,
                    micro_batch=micro_batch,
                    rank=rank,
                    world_size=world_size,
                ),
                12,
            )
            for rank in range(world_size)
        ]
        for step, whole in enumerate(alone):
            assert same(joined([batches[step] for batches in ranks]), whole)
    # Half as large micro-batches are the same samples, two micro-steps for one.
    halves = take(training_batches(samples, start=16, micro_batch=4), 24)
    for step, whole in enumerate(alone):
        assert same(joined(halves[2 * step : 2 * step + 2]), whole)
    # A run resumed after 40 more samples.
    resumed = take(training_batches(samples, start=56, micro_batch=8), 7)
    assert all(same(left, right) for left, right in zip(resumed, alone[5:], strict=True))


@pytest.mark.parametrize("kind", list(DataKind))
def test_workers_give_the_same_batches(mixture: DataConfig, kind: DataKind) -> None:
    task = RecallConfig(vocab_size=64, length=16, n_pairs=3, n_train=300, n_test=5)
    samples = prepare_data(dataclasses.replace(mixture, kind=kind, recall=task), seed=4).train
    inline = take(training_batches(samples, start=3, micro_batch=4), 20)
    batches = training_batches(samples, start=3, micro_batch=4, num_workers=2)
    assert all(same(left, right) for left, right in zip(inline, take(batches, 20), strict=True))


def test_drawing_batches_leaves_the_runs_random_numbers_alone(mixture: DataConfig) -> None:
    samples = prepare_data(mixture, seed=4).train
    state = torch.get_rng_state()
    take(training_batches(samples, start=0, micro_batch=4), 3)
    assert torch.get_rng_state().equal(state)


def test_epochs_cut_the_text_differently(tmp_path: Path) -> None:
    config = config_for(tmp_path, [write_texts(tmp_path, "a", [prose(1, 400)])])
    samples = prepare_data(config, seed=0).train
    count = samples.tokens // 32
    epochs = [
        {tuple(samples.sample(epoch * count + i)["input_ids"].tolist()) for i in range(count)}
        for epoch in range(3)
    ]
    assert all(len(epoch) == count for epoch in epochs)
    assert len(epochs[0] | epochs[1] | epochs[2]) == 3 * count


def test_mixture_gives_each_source_its_share(tmp_path: Path) -> None:
    left = write_texts(tmp_path, "left", ["abc " * 300])
    right = write_texts(tmp_path, "right", ["XYZ " * 100])
    sources = [{"path": left, "weight": 3}, right]
    samples = prepare_data(config_for(tmp_path, sources), seed=0).train
    inputs = joined(take(training_batches(samples, start=0, micro_batch=8), 50))["input_ids"]
    from_left = (inputs == ord("a")).any(dim=1)
    assert int(from_left.sum()) == 300
    assert int((inputs == ord("X")).any(dim=1).sum()) == 100


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_batches_hold_every_token_once(mixture: DataConfig, world_size: int) -> None:
    corpus = prepare_data(mixture, seed=0)
    samples = corpus.validation
    assert samples is not None
    shares = [
        list(validation_batches(samples, batch_size=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch["labels"]) == 3 for share in shares for batch in share)
    labels: list[int] = []
    for step in range(len(shares[0])):
        for share in shares:
            labels += share[step]["labels"].flatten().tolist()
    labels = [label for label in labels if label != IGNORED]
    expected: list[int] = []
    for store in stores(corpus)[1]:
        expected += store.read(1, store.tokens).tolist()
    assert labels == expected
    assert len(labels) == samples.tokens


def test_limited_validation_is_spread_evenly(mixture: DataConfig) -> None:
    samples = prepare_data(mixture, seed=0).validation
    assert samples is not None
    batches = list(validation_batches(samples, batch_size=2, max_batches=2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2]
    expected = [samples[i * len(samples) // 4] for i in range(4)]
    for row, sample in enumerate(expected):
        assert joined(batches)["labels"][row].equal(sample["labels"])
    with pytest.raises(IndexError):
        samples[len(samples)]
    plenty = list(validation_batches(samples, batch_size=2, max_batches=1000))
    assert len(plenty) == -(-len(samples) // 2)


def test_recall_is_a_corpus_without_a_tokenizer(tmp_path: Path) -> None:
    task = RecallConfig(vocab_size=64, length=16, n_pairs=3, n_train=300, n_test=5)
    config = DataConfig(kind=DataKind.recall, recall=task)
    corpus = prepare_data(config, seed=0)
    assert corpus.tokenizer is None
    assert (corpus.vocab_size, corpus.sequence_length) == (64, 16)
    batch = next(training_batches(corpus.train, start=0, micro_batch=2))
    assert set(batch) == {"input_ids", "labels"}
    assert corpus.validation is not None
    (only,) = validation_batches(corpus.validation, batch_size=8)
    assert int((only["labels"] != IGNORED).sum()) == 15


def test_pretrained_tokenizer_from_a_file(tmp_path: Path) -> None:
    folder = os.environ.get("MAMBA2LM_SHARED_DATA")
    if not folder:
        pytest.skip("MAMBA2LM_SHARED_DATA does not name a folder with tokenizers/")
    path = str(Path(folder) / "tokenizers" / "gpt-neox-20b.json")
    tokenizer = TokenizerConfig(kind=TokenizerKind.pretrained, path=path)
    config = config_for(tmp_path, ["austen"], tokenizer=tokenizer)
    corpus = prepare_data(config, seed=0)
    assert corpus.vocab_size == 50277
    (train,), (held_out,) = stores(corpus)
    assert train.read(0, 2).tolist()[0] == 0
    assert 3.5 < (train.bytes + held_out.bytes) / (train.tokens + held_out.tokens) < 4.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, r"data.sources=\[\]: name at least one"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction=1.0"),
        ({"validation_fraction": -0.1}, r"data.validation_fraction=-0.1"),
        ({"sequence_length": 0}, r"data.sequence_length=0"),
        ({"num_workers": -1}, r"data.num_workers=-1"),
        ({"sources": ["austin"]}, r"data.sources\[0\].path='austin': no such file"),
        (
            {"sources": ["austen"], "validation_sources": [{"path": "no.txt"}]},
            r"data.validation_sources\[0\].path='no.txt'",
        ),
        (
            {"tokenizer": TokenizerConfig(vocab_size=256)},
            r"data.tokenizer.vocab_size=256: a BPE needs 257",
        ),
        (
            {"tokenizer": TokenizerConfig(kind=TokenizerKind.pretrained)},
            r"data.tokenizer.path=None: kind=pretrained needs",
        ),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(config_for(tmp_path, ["austen"]), **changes)
    with pytest.raises(ConfigError, match=message):
        prepare_data(config, seed=0)


def test_too_short_a_source_is_named(tmp_path: Path) -> None:
    long = write_texts(tmp_path, "long", [prose(1, 400)])
    short = write_texts(tmp_path, "short", ["tiny"])
    with pytest.raises(ConfigError, match=r"data.sequence_length=32: .*short.jsonl has only 5"):
        prepare_data(config_for(tmp_path, [long, short], validation_fraction=0.0), seed=0)
