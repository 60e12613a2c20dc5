"""File formats: what a file holds, whatever it is compressed with."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mamba2lm.schema import ConfigError, closest

FORMATS: Final = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS: Final = (".gz", ".xz", ".bz2", ".zst")


def read_file(path: Path, field: str, key: str) -> Iterator[str]:
    """Yield the documents of one file; a text file is one document.

    Args:
        path: A `.txt`, `.jsonl`, `.json` (one object a line) or `.parquet` file, each also
            compressed as `.gz`, `.xz`, `.bz2` or `.zst`.
        field: The field that holds the text in JSON lines and Parquet.
        key: The source's config key, for error messages.

    Raises:
        ConfigError: The file is damaged, not UTF-8, not JSON, or lacks the field.
    """
    kind, compression = format_of(path, f"{key}.path")
    try:
        with _open(path, compression) as stream:
            if kind == ".txt":
                yield _decode(stream.read(), path, 0, key).removeprefix("\ufeff")
            elif kind == ".parquet":
                yield from _read_parquet(stream, path, field, key)
            else:
                yield from _read_json_lines(stream, path, field, key)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, pa.ArrowInvalid) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"{key}.path", str(path), f"the file is damaged or not what its name says: {reason}."
        ) from error
    except OSError as error:
        raise ConfigError(f"{key}.path", str(path), f"cannot be read: {error}.") from error


def texts_of(rows: Iterable[Mapping[str, Any]], field: str, name: str, key: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield _field_of(row, field, f"{name}, row {number}", key)


def format_of(path: Path, key: str) -> tuple[str, str]:
    kind, compression = suffixes_of(path)
    if kind not in FORMATS:
        raise ConfigError(key, str(path), f"cannot read this kind of file; {known_suffixes()}.")
    return kind, compression


def suffixes_of(path: Path) -> tuple[str, str]:
    """Return the format's and the compression's suffix, in lower case, each perhaps empty."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


def known_suffixes() -> str:
    return f"{', '.join(FORMATS)} (plain or {', '.join(COMPRESSIONS)})"


def _read_json_lines(stream: IO[bytes], path: Path, field: str, key: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, path, offset, key)
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{key}.path",
                str(path),
                f"{path.name}:{number} is not JSON ({error}); one object a line is expected.",
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{key}.path",
                str(path),
                f"{path.name}:{number} holds a JSON {type(row).__name__}; "
                "one object a line is expected.",
            )
        yield _field_of(row, field, f"{path.name}:{number}", key)


def _read_parquet(stream: IO[bytes], path: Path, field: str, key: str) -> Iterator[str]:
    file = pq.ParquetFile(pa.PythonFile(stream, mode="r"))
    if field not in file.schema_arrow.names:
        raise _missing_field(field, file.schema_arrow.names, path.name, key)
    row = 0
    for batch in file.iter_batches(columns=[field], batch_size=1024):
        for text in batch.column(0).to_pylist():
            row += 1
            yield _field_of({field: text}, field, f"{path.name}, row {row}", key)


def _field_of(row: Mapping[str, Any], field: str, where: str, key: str) -> str:
    if field not in row:
        raise _missing_field(field, list(row), where, key)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ConfigError(
            f"{key}.field",
            field,
            f"{where} holds a {type(text).__name__} there, not a text.",
        )
    return text


def _missing_field(field: str, found: list[str], where: str, key: str) -> ConfigError:
    return ConfigError(
        f"{key}.field",
        field,
        f"{where} has no such field.{closest(field, found)} It has: {', '.join(found) or 'none'}.",
    )


def _decode(raw: bytes, path: Path, offset: int, key: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}.path",
            str(path),
            f"not UTF-8: byte {raw[error.start]:#04x} at offset {offset + error.start}. Convert "
            "it first, for example with `iconv -f LATIN1 -t UTF-8`.",
        ) from error


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    if compression == ".zst":
        # The standard library reads Zstandard only from Python 3.14 on.
        with pa.input_stream(str(path), compression="zstd") as stream:
            return io.BytesIO(stream.read())
    return path.open("rb")
