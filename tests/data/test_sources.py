"""Reading every format, the errors of every kind of bad file, and the held-out split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mamba2lm.data.sources import (
    Cut,
    Part,
    Source,
    SourceConfig,
    find_cut,
    parse_source,
    split_documents,
)
from mamba2lm.schema import ConfigError
from tests.data.texts import prose, random_text

KEY = "data.sources[0]"
TEXTS = [random_text(seed) for seed in range(5)]


def zstd(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}


def contents(kind: str) -> bytes:
    if kind == ".txt":
        return TEXTS[0].encode()
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), sink)
        return sink.getvalue().to_pybytes()
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    return "\n".join([*rows, "", ""]).encode()


def open_source(tmp_path: Path, config: SourceConfig) -> Source:
    return Source(config, KEY, tmp_path / "cache")


def read(tmp_path: Path, config: SourceConfig) -> list[str]:
    return list(open_source(tmp_path, config).documents())


def error_of(tmp_path: Path, config: SourceConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_its_documents(tmp_path: Path, kind: str, compression: str) -> None:
    file = tmp_path / f"some{kind}{compression}"
    file.write_bytes(COMPRESS[compression](contents(kind)))
    expected = [TEXTS[0].removeprefix("\ufeff")] if kind == ".txt" else TEXTS
    assert read(tmp_path, SourceConfig(path=str(file))) == expected


def test_folder_and_glob_read_sorted_files(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "b").mkdir(parents=True)
    for name, text in (("z.txt", "last"), ("a.txt", "first"), ("b/m.jsonl", '{"text": "mid"}')):
        (texts / name).write_text(text)
    (texts / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path, SourceConfig(path=str(texts))) == ["first", "mid", "last"]
    assert read(tmp_path, SourceConfig(path=str(texts / "*.txt"))) == ["first", "last"]
    assert read(tmp_path, SourceConfig(path=str(texts / "**/*.jsonl"))) == ["mid"]


def test_carried_corpus_is_the_novels(tmp_path: Path) -> None:
    (text,) = read(tmp_path, SourceConfig(path="austen"))
    assert len(text.encode()) == 4_025_033
    assert text.startswith("EMMA\n")
    assert "It is a truth universally acknowledged" in text


def test_other_field_empty_documents_and_max_documents(tmp_path: Path) -> None:
    rows = [{"body": "one"}, {"body": ""}, {"body": None}, {"body": "two"}, {"body": "three"}]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert read(tmp_path, SourceConfig(path=str(file), field="body")) == ["one", "two", "three"]
    limited = SourceConfig(path=str(file), field="body", max_documents=2)
    assert read(tmp_path, limited) == ["one", "two"]


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a\\ud83d b\\ud83d\\ude00"}\n')
    assert read(tmp_path, SourceConfig(path=str(file))) == ["a\ufffd b😀"]


def test_parse_source_reads_strings_and_mappings() -> None:
    assert parse_source("austen", KEY) == SourceConfig(path="austen")
    assert parse_source("hub:a/b", KEY) == SourceConfig(hub="a/b")
    assert parse_source("x/*.txt", KEY) == SourceConfig(path="x/*.txt")
    mapping = {"path": "x.jsonl", "weight": 2}
    assert parse_source(mapping, KEY) == SourceConfig(path="x.jsonl", weight=2.0)
    with pytest.raises(ConfigError, match=r"data.sources\[0\].wieght=.*Did you mean 'weight'"):
        parse_source({"path": "x", "wieght": 1}, KEY)
    for bad in ("", "hub:", 3, None):
        with pytest.raises(ConfigError, match="a source is 'austen'"):
            parse_source(bad, KEY)


def test_missing_files_name_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "novels.txt").write_text("x")
    message = error_of(tmp_path, SourceConfig(path=str(tmp_path / "novel.txt")))
    assert message.startswith("data.sources[0].path=")
    assert f"Did you mean '{tmp_path / 'novels.txt'}'?" in message
    assert "Its folder does not exist" in error_of(tmp_path, SourceConfig(path="/no/where.txt"))
    pattern = SourceConfig(path=str(tmp_path / "*.jsonl"))
    assert "matches no file" in error_of(tmp_path, pattern)
    (tmp_path / "empty").mkdir()
    folder = SourceConfig(path=str(tmp_path / "empty"))
    assert "no .txt, .jsonl, .json, .parquet" in error_of(tmp_path, folder)
    (tmp_path / "x.doc").write_text("x")
    document = SourceConfig(path=str(tmp_path / "x.doc"))
    assert "cannot read this kind of file" in error_of(tmp_path, document)


@pytest.mark.parametrize(
    ("name", "raw", "parts"),
    [
        ("x.txt", "schön".encode("latin-1"), ["not UTF-8", "0xf6 at offset 3", "iconv"]),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            ["not UTF-8", "0xff at offset 24"],
        ),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', ["x.jsonl:2 is not JSON"]),
        ("x.jsonl", b'["a"]\n', ["x.jsonl:1 holds a JSON list"]),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', ["text", "x.jsonl:1", "It has: body, id."]),
        ("x.jsonl", b'{"text": 3}\n', ["x.jsonl:1 holds a int there"]),
        ("x.parquet", b"no parquet at all", ["damaged or not what its name says"]),
        ("x.txt.gz", b"no gzip", ["damaged or not what its name says"]),
        ("x.txt.xz", lzma.compress(b"text" * 99)[:-9], ["damaged or not what its name says"]),
        ("x.txt.bz2", b"no bzip2", ["x.txt.bz2"]),
        ("x.txt.zst", b"no zstandard", ["x.txt.zst"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, raw: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(raw)
    message = error_of(tmp_path, SourceConfig(path=str(tmp_path / name)))
    assert message.startswith("data.sources[0].")
    for part in parts:
        assert part in message


def test_missing_parquet_field_lists_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    message = error_of(tmp_path, SourceConfig(path=str(tmp_path / "x.parquet")))
    assert "data.sources[0].field='text'" in message
    assert "It has: body, id." in message


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        message = error_of(tmp_path, SourceConfig(path="austen", weight=weight))
        assert message.startswith("data.sources[0].weight=")
    assert "max_documents=0" in error_of(tmp_path, SourceConfig(path="austen", max_documents=0))
    assert "either `path` or `hub`" in error_of(tmp_path, SourceConfig())
    both = SourceConfig(path="austen", hub="a/b")
    assert "either `path` or `hub`" in error_of(tmp_path, both)
    (tmp_path / "empty.txt").write_text("")
    empty = open_source(tmp_path, SourceConfig(path=str(tmp_path / "empty.txt")))
    with pytest.raises(ConfigError, match="no text in it"):
        empty.document_bytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set_from_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(contents(".jsonl").strip() + b"\n")
    given = SourceConfig(hub=str(folder), streaming=streaming, max_documents=4)
    assert read(tmp_path, given) == TEXTS[:4]
    message = error_of(tmp_path, SourceConfig(hub=str(folder), streaming=streaming, field="body"))
    assert "data.sources[0].field='body'" in message
    assert "It has: id, text." in message


def test_stream_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def rows(self: Source) -> list[dict[str, str]]:
        fetched.append(self.name)
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr(Source, "_load_hub", rows)
    source = open_source(tmp_path, SourceConfig(hub="some/set", streaming=True))
    assert list(source.documents()) == TEXTS
    assert list(source.documents()) == TEXTS
    assert fetched == ["hub:some/set"]


def test_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    message = error_of(tmp_path, SourceConfig(hub="nobody/no-such-set"))
    assert message.startswith("data.sources[0].hub='nobody/no-such-set'")
    assert "HF_HUB_OFFLINE" in message
    assert "local folder" in message


def write_documents(tmp_path: Path, texts: list[str]) -> Source:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_source(tmp_path, SourceConfig(path=str(file)))


def parts_of(source: Source, cut: Cut) -> dict[Part, str]:
    parts = dict.fromkeys(Part, "")
    for part, text in split_documents(source.documents(), cut):
        parts[part] += text
    return parts


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_split_of_one_document_is_at_a_line_end(tmp_path: Path, fraction: float) -> None:
    text = prose(1, 4000)
    source = write_documents(tmp_path, [text])
    parts = parts_of(source, find_cut(source, fraction))
    assert parts[Part.train] + parts[Part.validation] == text
    assert len(parts[Part.validation]) / len(text) == pytest.approx(fraction, rel=0.5)
    assert parts[Part.train].endswith("\n")


def test_split_prefers_whole_documents_when_they_are_short(tmp_path: Path) -> None:
    texts = [prose(seed, 30) for seed in range(300)]
    source = write_documents(tmp_path, texts)
    divided = list(split_documents(source.documents(), find_cut(source, 0.2)))
    assert [text for _, text in divided] == texts
    held = "".join(text for part, text in divided if part is Part.validation)
    assert len(held) / len("".join(texts)) == pytest.approx(0.2, abs=0.01)


def test_split_of_any_text_loses_nothing(tmp_path: Path) -> None:
    for seed in range(20):
        texts = [random_text(100 * seed + i) for i in range(3)]
        source = write_documents(tmp_path, texts)
        for fraction in (0.0, 0.001, 0.1, 0.4, 0.999, 1.0):
            parts = parts_of(source, find_cut(source, fraction))
            assert parts[Part.train] + parts[Part.validation] == "".join(texts)
            if fraction in (0.0, 1.0):
                empty = Part.validation if fraction == 0.0 else Part.train
                assert parts[empty] == ""


def test_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("some text")
    config = SourceConfig(path=str(file))
    first = open_source(tmp_path, config).fingerprint()
    assert open_source(tmp_path, config).fingerprint() == first
    limited = SourceConfig(path=str(file), max_documents=1)
    assert open_source(tmp_path, limited).fingerprint() != first
    file.write_text("other, longer text")
    assert open_source(tmp_path, config).fingerprint() != first
