"""Tokenise a source once, into memory-mapped files that every later start reads.

A stored part is a folder:

    tokens_000.bin …   the ids, little-endian uint16 or uint32, about 256 million a file
    starts.npy         int64, where each document begins, in tokens
    bytes.npy          int64, each document's UTF-8 length
    meta.json          totals, dtype and the SHA-256 of the ids

A document is its tokenizer's end-of-text id followed by its tokens. The separator comes first and
belongs to the document it opens: a fresh state that reads it predicts the first token, and the last
token of a document predicts the next document's separator.

Legend: l tokens, d documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mamba2lm.data.sources import Cut, Part, Source, digest, find_cut, split_documents
from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.schema import ConfigError

logger = logging.getLogger(__name__)

SHARD_TOKENS: Final = 2**28
_FORMAT: Final = 1
_BATCH_CHARACTERS: Final = 4 * 2**20


class TokenStore:
    """The tokens of one part of one source, read from its memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `tokenize` wrote."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.tokens: int = meta["tokens"]
        self.documents: int = meta["documents"]
        self.bytes: int = meta["bytes"]
        self.sha256: str = meta["sha256"]
        self.eos_id: int = meta["eos_id"]
        self._dtype = np.dtype(meta["dtype"])
        self._shard_tokens: int = meta["shard_tokens"]
        self._open()

    def _open(self) -> None:
        self.starts_d: npt.NDArray[np.int64] = _map_array(self.folder / "starts.npy")
        self.bytes_d: npt.NDArray[np.int64] = _map_array(self.folder / "bytes.npy")
        count = -(-self.tokens // self._shard_tokens)
        self._shards = [
            np.memmap(_shard(self.folder, index), dtype=self._dtype, mode="r")
            for index in range(count)
        ]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return tokens ``start`` to ``stop`` as int64 (stop - start,).

        Args:
            start: First token, from 0.
            stop: One past the last, at most the number of tokens.
        """
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        tokens_l = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            shard, offset = divmod(position, self._shard_tokens)
            taken = min(stop - position, self._shard_tokens - offset)
            at = position - start
            tokens_l[at : at + taken] = self._shards[shard][offset : offset + taken]
            position += taken
        return tokens_l

    # A memory map pickles as a copy of everything it maps; a worker process opens its own.
    def __getstate__(self) -> dict[str, Any]:
        mapped = ("starts_d", "bytes_d", "_shards")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class TokenWriter:
    """Write one part's files, document by document."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._eos_id = tokenizer.eos_id
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._shard_tokens = shard_tokens
        self._tokens = 0
        self._starts: list[int] = []
        self._bytes: list[int] = []
        self._sha256 = hashlib.sha256()
        self._file = _shard(folder, 0).open("wb")

    def begin_document(self, n_bytes: int) -> None:
        """Open a document of ``n_bytes`` UTF-8 bytes with its separator."""
        self._starts.append(self._tokens)
        self._bytes.append(n_bytes)
        self.extend([self._eos_id])

    def extend(self, ids: list[int]) -> None:
        """Append tokens to the open document."""
        tokens_l = np.asarray(ids, dtype=self._dtype)
        self._sha256.update(np.asarray(ids, dtype="<u4").tobytes())
        while tokens_l.size:
            shard, offset = divmod(self._tokens, self._shard_tokens)
            if offset == 0 and shard > 0:
                self._file.close()
                self._file = _shard(self._folder, shard).open("wb")
            taken = tokens_l[: self._shard_tokens - offset]
            self._file.write(taken.tobytes())
            self._tokens += taken.size
            tokens_l = tokens_l[taken.size :]

    def close(self) -> None:
        """Write the index and, last, the totals that mark the folder complete."""
        self._file.close()
        np.save(self._folder / "starts.npy", np.asarray(self._starts, dtype=np.int64))
        np.save(self._folder / "bytes.npy", np.asarray(self._bytes, dtype=np.int64))
        meta = {
            "format": _FORMAT,
            "tokens": self._tokens,
            "documents": len(self._starts),
            "bytes": sum(self._bytes),
            "sha256": self._sha256.hexdigest(),
            "eos_id": self._eos_id,
            "dtype": self._dtype.str,
            "shard_tokens": self._shard_tokens,
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    fraction: float,
    cache: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[Part, TokenStore]:
    """Return a source's two parts as tokens, writing them if the cache has them not.

    Args:
        source: The source.
        tokenizer: Its fingerprint is part of the key.
        fraction: Share of the bytes to hold out, in [0, 1].
        cache: The cache's folder.
        shard_tokens: Most tokens a file holds.

    Returns:
        Both parts; either may hold no token.

    Raises:
        ConfigError: The source holds no text or cannot be read.
    """
    identity = [_FORMAT, source.fingerprint(), tokenizer.fingerprint, fraction, shard_tokens]
    folder = cache / "tokens" / digest(identity)[:32]
    if folder.is_dir() and not _is_complete(folder):
        logger.warning("%s is damaged; tokenising %s again", folder, source.name)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        try:
            _write(source, tokenizer, fraction, temporary, shard_tokens)
            try:
                os.rename(temporary, folder)
            except OSError:
                # Another process wrote the same tokens first; use those.
                if not _is_complete(folder):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {part: TokenStore(folder / part.value) for part in Part}


def progress_bar() -> Progress:
    """Return a bar over bytes of text, drawn on standard error where that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _write(
    source: Source, tokenizer: Tokenizer, fraction: float, folder: Path, shard_tokens: int
) -> None:
    began = time.perf_counter()
    cut = find_cut(source, fraction)
    writers = {part: TokenWriter(folder / part.value, tokenizer, shard_tokens) for part in Part}
    documents = n_bytes = n_tokens = 0
    with progress_bar() as progress:
        task = progress.add_task(f"tokenising {source.name}", total=cut.bytes)
        for batch in _batches(source, tokenizer, cut):
            encoded = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (part, size, _), ids in zip(batch, encoded, strict=True):
                writer = writers[part]
                if size is not None:
                    writer.begin_document(size)
                    documents += 1
                    n_bytes += size
                    progress.update(task, advance=size)
                writer.extend(ids)
                n_tokens += len(ids)
    if documents == 0:
        raise source.empty()
    for writer in writers.values():
        writer.close()
    seconds = time.perf_counter() - began
    logger.info(
        "tokenised %s: %d documents, %.1f MB, %d tokens (%.2f bytes a token) in %.1f s",
        source.name,
        documents,
        n_bytes / 1e6,
        n_tokens,
        n_bytes / max(n_tokens, 1),
        seconds,
    )


def _batches(
    source: Source, tokenizer: Tokenizer, cut: Cut
) -> Iterator[list[tuple[Part, int | None, str]]]:
    """Yield lists of (part, bytes, piece), the document's bytes only at its first piece."""
    batch: list[tuple[Part, int | None, str]] = []
    characters = 0
    for part, text in split_documents(source.documents(), cut):
        size: int | None = len(text.encode())
        for piece in tokenizer.pieces(text):
            batch.append((part, size, piece))
            size = None
            characters += len(piece)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _is_complete(folder: Path) -> bool:
    for part in Part:
        try:
            meta = json.loads((folder / part.value / "meta.json").read_text(encoding="utf-8"))
            names = sorted((folder / part.value).glob("tokens_*.bin"))
            size = sum(name.stat().st_size for name in names)
            if size != meta["tokens"] * np.dtype(meta["dtype"]).itemsize:
                return False
            for name in ("starts.npy", "bytes.npy"):
                if _map_array(folder / part.value / name).size != meta["documents"]:
                    return False
        except (OSError, ValueError, KeyError):
            return False
    return True


def _shard(folder: Path, index: int) -> Path:
    return folder / f"tokens_{index:03d}.bin"


def _map_array(file: Path) -> npt.NDArray[np.int64]:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        return np.load(file, allow_pickle=False)


def make_cache(folder: str | None) -> Path:
    """Return the cache's folder, made and writable.

    Args:
        folder: As in the config; None means ``$MAMBA2LM_CACHE`` or ``~/.cache/mamba2lm``.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    chosen = folder or os.environ.get("MAMBA2LM_CACHE") or "~/.cache/mamba2lm"
    path = Path(chosen).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            "data.cache_dir", str(chosen), f"cannot be written to ({error}); choose another folder."
        ) from error
    return path
