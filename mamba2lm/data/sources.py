"""Where text comes from: files, folders, globs, the carried corpus, a hub data set.

A source is read as a sequence of documents, each a Python string. Its last fraction can be held
out: `find_cut` says where, `split_documents` divides at that place.
"""

from __future__ import annotations

import difflib
import enum
import glob
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mamba2lm.data.formats import (
    FORMATS,
    format_of,
    known_suffixes,
    read_file,
    suffixes_of,
    texts_of,
)
from mamba2lm.schema import ConfigError, from_mapping

logger = logging.getLogger(__name__)

CARRIED: Final = {"austen": Path(__file__).parent / "corpora" / "austen.txt.xz"}

# Documents of a source no larger than this stay in memory between the passes that measure, train
# a tokenizer and tokenise; a larger source is read again for each.
_HELD_BYTES: Final = 256 * 2**20
_STREAM_ROWS: Final = 1024


class Part(enum.Enum):
    """The two parts of a source."""

    train = "train"
    validation = "validation"


@dataclass
class SourceConfig:
    """Where one source's documents are and how many samples it gives.

    Attributes:
        path: A file, folder or glob, or the name of the carried corpus (``austen``).
        hub: A data set's hub name, or a local folder that ``datasets.load_dataset`` reads.
        hub_config: The data set's configuration, where it has several.
        split: The split of a hub data set.
        streaming: Read the hub data set as a stream, so that ``max_documents`` of a large one
            need no full download.
        field: The field that holds the text (JSON lines, Parquet, hub).
        weight: Share of the training samples drawn from this source, relative to the others.
        max_documents: Use only this many documents from the start.
    """

    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    streaming: bool = False
    field: str = "text"
    weight: float = 1.0
    max_documents: int | None = None


@dataclass(frozen=True)
class Cut:
    """The place where the held-out part of a source begins.

    Attributes:
        document: Index of the first document that is held out, wholly or in part.
        characters: How many characters of that document still belong to the training part.
        bytes: UTF-8 bytes of the whole source, or None where nothing had to be measured.
    """

    document: int
    characters: int = 0
    bytes: int | None = None


class Source:
    """One source's documents, its name and its fingerprint."""

    def __init__(self, config: SourceConfig, key: str, cache: Path) -> None:
        """Find the files, so that a wrong path fails before anything is read.

        Args:
            config: The source.
            key: Its config key for error messages, e.g. ``data.sources[0]``.
            cache: Folder in which a streamed source keeps its text.

        Raises:
            ConfigError: A wrong weight, count, path, suffix or glob.
        """
        self.config = config
        self.key = key
        self._cache = cache
        self._held: list[str] | None = None
        self._sizes: list[int] | None = None
        if (config.path is None) == (config.hub is None):
            raise ConfigError(
                key, config.path or config.hub, "give either `path` or `hub`, and only one of them."
            )
        if not config.weight > 0 or not np.isfinite(config.weight):
            raise ConfigError(
                f"{key}.weight",
                config.weight,
                "a weight is a positive number; leave a source out of the list to drop it.",
            )
        if config.max_documents is not None and config.max_documents < 1:
            raise ConfigError(
                f"{key}.max_documents", config.max_documents, "use 1 or more, or null for all."
            )
        self._files = [] if config.path is None else find_files(config.path, f"{key}.path")

    @property
    def name(self) -> str:
        """Return the path or the hub name, as the user wrote it."""
        return self.config.path or f"hub:{self.config.hub}"

    def fingerprint(self) -> str:
        """Return a digest that changes when the source's documents may have changed.

        Files count by path, size and modification time, the carried corpus by its content, a hub
        data set by its name, configuration and split.
        """
        config = self.config
        origin: object
        if config.path in CARRIED:
            origin = hashlib.sha256(CARRIED[config.path].read_bytes()).hexdigest()
        elif config.path is not None:
            origin = [_file_identity(file) for file in self._files]
        else:
            folder = Path(str(config.hub)).expanduser()
            files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
            origin = [
                [config.hub, config.hub_config, config.split],
                [_file_identity(file) for file in files],
            ]
        return digest([origin, config.field, config.max_documents])

    def documents(self) -> Iterator[str]:
        """Yield the documents that hold any text, at most ``max_documents`` of them.

        Raises:
            ConfigError: A file that cannot be read as what its name says it is.
        """
        if self._held is not None:
            return iter(self._held)
        found = (_replace_surrogates(text) for text in self._read() if text)
        return itertools.islice(found, self.config.max_documents)

    def document_bytes(self) -> list[int]:
        """Return the UTF-8 length of every document, keeping a small source in memory.

        Raises:
            ConfigError: There is no text at all.
        """
        if self._sizes is not None:
            return self._sizes
        sizes: list[int] = []
        held: list[str] | None = []
        total = 0
        for text in self.documents():
            sizes.append(len(text.encode()))
            total += sizes[-1]
            if held is not None:
                held.append(text)
            if total > _HELD_BYTES:
                held = None
        if not sizes:
            raise self.empty()
        self._held, self._sizes = held, sizes
        return sizes

    def empty(self) -> ConfigError:
        """Return the error of a source without text."""
        where = "path" if self.config.path is not None else "hub"
        return ConfigError(
            f"{self.key}.{where}", self.name, "no text in it: every file or document is empty."
        )

    def _read(self) -> Iterator[str]:
        if self.config.hub is not None:
            return self._read_hub()
        return itertools.chain.from_iterable(
            read_file(file, self.config.field, self.key) for file in self._files
        )

    def _read_hub(self) -> Iterator[str]:
        if not self.config.streaming:
            return texts_of(self._load_hub(), self.config.field, self.name, self.key)
        # A stream is fetched once and kept as Parquet: it is read several times (to measure, to
        # train a tokenizer, to tokenise), and a second fetch could differ from the first.
        kept = self._cache / "streams" / f"{self.fingerprint()}.parquet"
        if not kept.exists():
            self._keep_stream(kept)
        return read_file(kept, self.config.field, self.key)

    def _keep_stream(self, kept: Path) -> None:
        field = self.config.field
        texts = itertools.islice(
            (t for t in texts_of(self._load_hub(), field, self.name, self.key) if t),
            self.config.max_documents,
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([(field, pa.large_string())])
        handle, temporary = tempfile.mkstemp(dir=kept.parent, suffix=".partial")
        os.close(handle)
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                while rows := list(itertools.islice(texts, _STREAM_ROWS)):
                    clean = [_replace_surrogates(row) for row in rows]
                    writer.write_table(pa.table({field: clean}, schema=schema))
            os.replace(temporary, kept)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _load_hub(self) -> Iterable[Mapping[str, Any]]:
        # Imported here because it takes a second that a run on local files need not wait for.
        from datasets import config as datasets_config
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        config = self.config
        name = str(config.hub)
        try:
            rows = load_dataset(
                str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name,
                config.hub_config,
                split=config.split,
                streaming=config.streaming,
            )
        except (OSError, ValueError, DatasetsError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
            offline = " (HF_HUB_OFFLINE is set)" if datasets_config.HF_HUB_OFFLINE else ""
            raise ConfigError(
                f"{self.key}.hub",
                name,
                f"the data set could not be loaded{offline}: {type(error).__name__}: {reason}. "
                "Check the name, hub_config and split; without a network, give a local folder "
                "of its files here (HF_HUB_OFFLINE=1 uses what the hub cache already holds).",
            ) from error
        # Without a batched view, rows are mappings; the library's annotation allows more.
        return cast("Iterable[Mapping[str, Any]]", rows)


def parse_source(value: object, key: str) -> SourceConfig:
    """Turn an entry of ``data.sources`` into a `SourceConfig`.

    Args:
        value: ``"austen"``, ``"hub:NAME"``, a path or a glob, or a mapping of `SourceConfig`'s
            fields.
        key: The entry's config key, for error messages.

    Raises:
        ConfigError: Neither a string nor a mapping, an empty string, or an unknown field.
    """
    if isinstance(value, SourceConfig):
        return value
    if isinstance(value, str):
        if value.startswith("hub:") and value != "hub:":
            return SourceConfig(hub=value.removeprefix("hub:"))
        if value and value != "hub:":
            return SourceConfig(path=value)
    elif isinstance(value, Mapping):
        return from_mapping(SourceConfig, value, key)
    raise ConfigError(
        key,
        value,
        "a source is 'austen', 'hub:NAME', a path or glob, or a mapping such as {path: x.jsonl}.",
    )


def find_files(path: str, key: str) -> list[Path]:
    """Return the files that a path, folder or glob names, sorted.

    Args:
        path: The carried corpus's name, a file, a folder (searched through) or a glob.
        key: Config key for error messages.

    Raises:
        ConfigError: Nothing is there, or a file is of a kind that cannot be read.
    """
    if path in CARRIED:
        return [CARRIED[path]]
    expanded = Path(path).expanduser()
    if expanded.is_file():
        format_of(expanded, key)
        return [expanded]
    if expanded.is_dir():
        files = sorted(
            p for p in expanded.rglob("*") if p.is_file() and suffixes_of(p)[0] in FORMATS
        )
        if not files:
            raise ConfigError(key, path, f"no {known_suffixes()} file in this folder.")
        return files
    if glob.has_magic(path):
        files = sorted(
            Path(p) for p in glob.glob(str(expanded), recursive=True) if Path(p).is_file()
        )
        if not files:
            raise ConfigError(
                key, path, f"this pattern matches no file (working folder: {Path.cwd()})."
            )
        for file in files:
            format_of(file, key)
        return files
    raise ConfigError(key, path, f"no such file or folder.{_nearest(expanded)}")


def find_cut(source: Source, fraction: float) -> Cut:
    """Find where the last ``fraction`` of a source's bytes begins.

    The place is the beginning of a document if the document around the exact spot is small beside
    the held-out part, and otherwise the nearest earlier end of a paragraph, of a line or of a word
    within it.

    Args:
        source: The source; measured unless the fraction is 0 or 1.
        fraction: Share of the UTF-8 bytes to hold out, in [0, 1].

    Returns:
        The cut. With 0 nothing is held out, with 1 everything.
    """
    if fraction <= 0.0:
        return Cut(document=np.iinfo(np.int64).max)
    if fraction >= 1.0:
        return Cut(document=0)
    sizes = source.document_bytes()
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1])
    target = total - round(total * fraction)
    index = min(int(np.searchsorted(ends, target, side="right")), len(sizes) - 1)
    inside = target - (int(ends[index]) - sizes[index])
    if inside == 0 or (index > 0 and sizes[index] <= 0.1 * (total - target)):
        return Cut(document=index, bytes=total)
    text = next(itertools.islice(source.documents(), index, None))
    return Cut(document=index, characters=_boundary(text, inside), bytes=total)


def split_documents(documents: Iterable[str], cut: Cut) -> Iterator[tuple[Part, str]]:
    """Yield every document with the part it belongs to; the one at the cut gives two.

    The texts, joined, are the joined documents, whatever the cut.
    """
    for index, text in enumerate(documents):
        if index < cut.document:
            yield Part.train, text
        elif index > cut.document or cut.characters == 0:
            yield Part.validation, text
        else:
            yield Part.train, text[: cut.characters]
            if cut.characters < len(text):
                yield Part.validation, text[cut.characters :]


def digest(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _boundary(text: str, target_bytes: int) -> int:
    """Return the character offset of a good place to cut at or before a byte offset."""
    raw = text.encode()
    # Never look back further than half of what is held out: the fraction matters more than the
    # beauty of the cut.
    lowest = max(target_bytes - (len(raw) - target_bytes) // 2, 1)
    for mark in (b"\n\n", b"\n", b" "):
        found = raw.rfind(mark, lowest, target_bytes)
        if found >= 0:
            target_bytes = found + len(mark)
            break
    return len(raw[:target_bytes].decode(errors="ignore"))


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" Its folder does not exist either (working folder: {Path.cwd()})."
    names = sorted(entry.name for entry in folder.iterdir())
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if found:
        return f" Did you mean '{folder / found[0]}'?"
    return f" The carried corpus is 'austen'; the working folder is {Path.cwd()}."


def _file_identity(path: Path) -> list[object]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
