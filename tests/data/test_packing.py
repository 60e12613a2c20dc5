"""Stored tokens and windows over them, against values worked out by hand."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from mamba2lm.data import shards
from mamba2lm.data.packing import IGNORED, PackedDataset
from mamba2lm.data.shards import TokenStore, make_cache, tokenize
from mamba2lm.data.sources import Part, Source, SourceConfig
from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.schema import ConfigError
from tests.data.texts import prose, random_text

EOS = 256


def source_of(tmp_path: Path, texts: list[str]) -> Source:
    file = tmp_path / "texts.jsonl"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    # Writing the same again would change the file's time, and with it the fingerprint.
    if not file.exists() or file.read_text() != rows:
        file.write_text(rows)
    return Source(SourceConfig(path=str(file)), "data.sources[0]", tmp_path)


def store_of(
    tmp_path: Path, texts: list[str], part: Part = Part.train, shard_tokens: int = 5
) -> TokenStore:
    fraction = 0.0 if part is Part.train else 1.0
    stores = tokenize(
        source_of(tmp_path, texts),
        Tokenizer.of_bytes(),
        fraction,
        tmp_path,
        shard_tokens=shard_tokens,
    )
    return stores[part]


def stream_of(texts: list[str]) -> list[int]:
    """The layout: every document is its separator, then its bytes."""
    return [i for text in texts for i in [EOS, *text.encode()]]


def test_documents_are_stored_with_the_separator_first(tmp_path: Path) -> None:
    store = store_of(tmp_path, ["abc", "é", "wxyz"])
    stream = [EOS, 97, 98, 99, EOS, 0xC3, 0xA9, EOS, 119, 120, 121, 122]
    assert store.read(0, store.tokens).tolist() == stream
    assert store.starts_d.tolist() == [0, 4, 7]
    assert store.bytes_d.tolist() == [3, 2, 4]
    assert (store.tokens, store.documents, store.bytes) == (12, 3, 9)
    # Files of five tokens: a read may cross two borders.
    assert len(list(store.folder.glob("tokens_*.bin"))) == 3
    for start in range(12):
        for stop in range(start, 13):
            assert store.read(start, stop).tolist() == stream[start:stop]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide(Tokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[70_000 + value for value in text.encode()] for text in texts]

        def pieces(self, text: str) -> list[str]:
            return [text]

    wide = Wide.of_bytes()
    wide.vocab_size = 70_256
    store = tokenize(source_of(tmp_path, ["abc"]), wide, 0.0, tmp_path)[Part.train]
    assert store.read(0, 4).tolist() == [EOS, 70_097, 70_098, 70_099]
    assert (store.folder / "tokens_000.bin").stat().st_size == 16


def test_pieces_of_a_long_document_stay_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba2lm.data.tokenizer._PIECE_CHARACTERS", 50)
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 120)
    texts = [prose(1, 300), "short", prose(2, 300)]
    store = store_of(tmp_path, texts, shard_tokens=1000)
    assert store.read(0, store.tokens).tolist() == stream_of(texts)
    assert store.bytes_d.tolist() == [len(text) for text in texts]


def test_training_windows_by_hand(tmp_path: Path) -> None:
    # stream: E a b c E d e E f g h i   (12 tokens), documents at 0, 4, 7
    packed = PackedDataset(store_of(tmp_path, ["abc", "de", "fghi"]), 5)
    a, b, c, d, e, f, g, h, i = range(97, 106)
    assert len(packed) == 2
    first = packed.sample(0, 0)
    assert first["input_ids"].tolist() == [EOS, a, b, c, EOS]
    assert first["labels"].tolist() == [a, b, c, EOS, d]
    assert first["seq_idx"].tolist() == [0, 0, 0, 0, 1]
    second = packed.sample(1, 0)
    assert second["input_ids"].tolist() == [d, e, EOS, f, g]
    assert second["labels"].tolist() == [e, EOS, f, g, h]
    assert second["seq_idx"].tolist() == [0, 0, 1, 1, 1]
    # Shifted by 4 the second window runs over the end into the first document.
    shifted = packed.sample(0, 4)
    assert shifted["input_ids"].tolist() == [EOS, d, e, EOS, f]
    assert shifted["seq_idx"].tolist() == [0, 0, 0, 1, 1]
    wrapped = packed.sample(1, 4)
    assert wrapped["input_ids"].tolist() == [g, h, i, EOS, a]
    assert wrapped["labels"].tolist() == [h, i, EOS, a, b]
    assert wrapped["seq_idx"].tolist() == [0, 0, 0, 1, 1]
    assert str(wrapped["seq_idx"].dtype) == "torch.int32"
    assert str(wrapped["input_ids"].dtype) == str(wrapped["labels"].dtype) == "torch.int64"


def test_evaluation_windows_by_hand(tmp_path: Path) -> None:
    packed = PackedDataset(store_of(tmp_path, ["abc", "de"], Part.validation), 5)
    a, b, c, d, e = range(97, 102)
    assert packed.evaluation_windows == 2
    first = packed.evaluation_sample(0)
    assert first["input_ids"].tolist() == [EOS, a, b, c, EOS]
    assert first["labels"].tolist() == [a, b, c, EOS, d]
    assert first["seq_idx"].tolist() == [0, 0, 0, 0, 1]
    last = packed.evaluation_sample(1)
    assert last["input_ids"].tolist() == [d, EOS, EOS, EOS, EOS]
    assert last["labels"].tolist() == [e, IGNORED, IGNORED, IGNORED, IGNORED]
    assert last["seq_idx"].tolist() == [0, 1, 1, 1, 1]


def test_carrying_state_leaves_out_document_numbers(tmp_path: Path) -> None:
    packed = PackedDataset(store_of(tmp_path, ["abc", "de"]), 3, reset_at_documents=False)
    assert set(packed.sample(0, 1)) == {"input_ids", "labels"}
    assert set(packed.evaluation_sample(0)) == {"input_ids", "labels"}


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_evaluation_covers_every_token_once(tmp_path: Path, length: int) -> None:
    texts = [prose(1, 400), "x", *(random_text(seed) for seed in range(30)), prose(2, 5)]
    store = store_of(tmp_path, texts, Part.validation, shard_tokens=777)
    packed = PackedDataset(store, length)
    stream = stream_of(texts)
    labels: list[int] = []
    for index in range(packed.evaluation_windows):
        sample = packed.evaluation_sample(index)
        assert len(sample["labels"]) == length
        labels += [label for label in sample["labels"].tolist() if label != IGNORED]
    assert labels == stream[1:]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_document_numbers_and_labels_agree_with_the_stream(tmp_path: Path, length: int) -> None:
    # One document far longer than a window, and many that are shorter.
    texts = [prose(1, 100), *(random_text(seed, 5) for seed in range(40))]
    packed = PackedDataset(store_of(tmp_path, texts, shard_tokens=97), length)
    stream = stream_of(texts)
    ring = np.asarray(stream * 2)
    document = np.cumsum(ring == EOS)
    for offset in range(0, length, 3):
        for index in range(len(packed)):
            start = offset + index * length
            sample = packed.sample(index, offset)
            assert sample["input_ids"].tolist() == ring[start : start + length].tolist()
            assert sample["labels"].tolist() == ring[start + 1 : start + length + 1].tolist()
            number = document[start : start + length] - document[start]
            assert sample["seq_idx"].tolist() == number.tolist()


def test_too_short_a_corpus_names_both_sizes(tmp_path: Path) -> None:
    store = store_of(tmp_path, ["abc", "de"])
    for length in (7, 8, 500):
        with pytest.raises(ConfigError, match=rf"data.sequence_length={length}: .*only 7 tokens"):
            PackedDataset(store, length).require_a_window("x")
    packed = PackedDataset(store, 6)
    packed.require_a_window("x")
    assert packed.sample(0, 5)["labels"].tolist() == [101, EOS, 97, 98, 99, EOS]


def test_store_travels_to_another_process_by_name(tmp_path: Path) -> None:
    store = store_of(tmp_path, [prose(1, 5000)], shard_tokens=100_000)
    packet = pickle.dumps(PackedDataset(store, 64))
    assert len(packet) < 2000
    again = pickle.loads(packet)
    assert again.sample(3, 2)["labels"].equal(PackedDataset(store, 64).sample(3, 2)["labels"])


def test_damaged_cache_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [prose(1, 200)]
    store = store_of(tmp_path, texts)
    expected = store.read(0, store.tokens).tolist()
    file = store.folder / "tokens_000.bin"
    file.write_bytes(file.read_bytes()[:-3])
    again = store_of(tmp_path, texts)
    assert "is damaged" in caplog.text
    assert again.read(0, again.tokens).tolist() == expected


def test_second_writer_loses_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(1, 50)]
    winner = store_of(tmp_path, texts)
    folder = winner.folder.parent
    kept = tmp_path / "kept"
    shutil.move(folder, kept)

    real = shards._write

    def slow(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        shutil.copytree(kept, folder)

    monkeypatch.setattr(shards, "_write", slow)
    store = store_of(tmp_path, texts)
    assert store.read(0, store.tokens).tolist() == stream_of(texts)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_failed_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    source = source_of(tmp_path, ["abc"])
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"texts.jsonl:2 is not JSON"):
        tokenize(source, Tokenizer.of_bytes(), 0.0, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*choose another folder"):
        make_cache(str(tmp_path / "file" / "cache"))
