"""How well a model predicts text, by three kinds of context.

A document is read as its separator followed by its tokens; every token of the text is predicted
exactly once, the separator never. So the three kinds score the same tokens and their figures
compare, and a document's first token is predicted from the separator alone.

Each token's loss is also added up by its context, the number of tokens read before its prediction,
the separator included: how far does context help?

Axes: b window, l position.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from torch import Tensor

from eval.config import Form, PerplexityConfig, Window
from eval.reading import Reader, pad
from mamba2lm.data import IGNORED, DataConfig, DataKind, Tokenizer
from mamba2lm.data.shards import make_cache
from mamba2lm.data.sources import Part, Source, find_cut, parse_source, split_documents
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError

T = TypeVar("T")

# Windows are sorted by length within this many batches.
_SORTED_BATCHES: Final = 16
# Documents are encoded in groups of so many characters: some batches, and work for every core.
_GROUP_CHARACTERS: Final = 1 << 19


@dataclass
class ContextBin:
    """The tokens that were predicted from so much context."""

    least: int
    most: int
    tokens: int = 0
    nll: float = 0.0
    """In nats."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


@dataclass
class PerplexityResult:
    """What was scored and how well it was predicted."""

    window: str
    """Kind of context; figures of different kinds are not the same measure."""
    length: int
    stride: int | None
    """Tokens between windows; None when streaming."""
    documents: int
    tokens: int
    words: int
    """Stretches between white space of the original text."""
    bytes: int
    """UTF-8 bytes of the original text."""
    nll: float
    """Sum of −log p over the tokens, in nats."""
    text_sha256: str
    by_context: list[ContextBin] = field(default_factory=list)
    """Contexts of 1, 2, 3 to 4, 5 to 8 … tokens; empty bins left out."""

    @property
    def token_perplexity(self) -> float:
        """exp(NLL / tokens): comparable between models with one tokenizer only."""
        return _exp(self.nll, self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(NLL / words): comparable whatever the tokenizer."""
        return _exp(self.nll, self.words)

    @property
    def bits_per_byte(self) -> float:
        """NLL / (bytes · ln 2): comparable whatever the tokenizer."""
        return self.nll / (self.bytes * math.log(2))


@dataclass
class Span:
    """One window: what is read, and what is to be predicted of it."""

    input_ids: list[int]
    labels: list[int]
    """As long as ``input_ids``; −100 where the token is scored by another window."""


class Tally:
    """Losses added up by the length of their context, on the device until they are asked for."""

    def __init__(self) -> None:
        self._tokens: dict[int, Tensor] = {}
        self._nll: dict[int, Tensor] = {}

    def add(self, loss_bl: Tensor, labels_bl: Tensor, read: int = 0) -> None:
        """Add a batch, without waiting for it.

        Args:
            loss_bl: Nats, (b, l), 0 where nothing counts.
            labels_bl: (b, l), −100 where nothing counts.
            read: Tokens that every row had read before the batch.
        """
        nll_l = loss_bl.double().sum(dim=0)
        tokens_l = (labels_bl != IGNORED).sum(dim=0)
        start, stop = read, read + nll_l.shape[0]
        while start < stop:
            bin_number = start.bit_length()  # context − 1 in bits
            end = min(1 << bin_number, stop)
            part = slice(start - read, end - read)
            for sums, of_l in ((self._nll, nll_l), (self._tokens, tokens_l)):
                found = of_l[part].sum()
                sums[bin_number] = sums[bin_number] + found if bin_number in sums else found
            start = end

    @property
    def bins(self) -> list[ContextBin]:
        """The bins that hold any token, shortest context first."""
        found = [
            ContextBin((1 << n >> 1) + 1, 1 << n, int(self._tokens[n]), float(self._nll[n]))
            for n in sorted(self._tokens)
        ]
        return [part for part in found if part.tokens]


def held_out_documents(data: DataConfig, key: str = "perplexity.sources") -> Iterator[str]:
    """Yield the text that a run with this data config does not train on.

    Args:
        data: The run's.
        key: Config key of the texts that could be named instead, for errors.

    Raises:
        ConfigError: The run has no text, held none out, or its sources cannot be read.
    """
    if data.kind is not DataKind.text:
        raise ConfigError(key, [], "the run has no text of its own; name some text to score.")
    found = False
    if data.validation_sources:
        for text in source_documents(
            data.validation_sources, "data.validation_sources", data.cache_dir
        ):
            found = True
            yield text
    else:
        for source in _open(data.sources, "data.sources", data.cache_dir):
            cut = find_cut(source, data.validation_fraction)
            for part, text in split_documents(source.documents(), cut):
                if part is Part.validation:
                    found = True
                    yield text
    if not found:
        raise ConfigError(key, [], "the run held no text out; name some text to score.")


def source_documents(sources: Sequence[object], key: str, cache_dir: str | None) -> Iterator[str]:
    """Yield every document of sources given as in ``data.sources``.

    Raises:
        ConfigError: A source that cannot be read.
    """
    for source in _open(sources, key, cache_dir):
        yield from source.documents()


def evaluate_perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    config: PerplexityConfig,
    *,
    length: int = 512,
    form: Form = Form.parallel,
    chunk: int = 4096,
) -> PerplexityResult:
    """Score documents.

    Args:
        model: On the device it shall run on.
        tokenizer: The one it was trained with.
        documents: Texts, read once; empty ones count for nothing.
        config: Kind of context; must be valid.
        length: Window length where the config has none.
        form: In which of its forms the model reads.
        chunk: Most tokens of a window read at once.

    Raises:
        ConfigError: No text, or streaming with a state that grows.
    """
    length = config.length or length
    stride = None
    if config.window is Window.disjoint:
        stride = length
    elif config.window is Window.strided:
        stride = config.stride or max(length // 2, 1)
        if stride > length:
            raise ConfigError(
                "perplexity.stride", stride, f"must be at most the window's length, {length}."
            )
    elif model.state_grows():
        raise ConfigError(
            "perplexity.window",
            config.window.value,
            "the model's attention keeps every token, so its state is not of constant size; "
            "use strided.",
        )
    result = PerplexityResult(
        config.window.value, length, stride, documents=0, tokens=0, words=0, bytes=0, nll=0.0,
        text_sha256="",
    )  # fmt: skip
    digest = hashlib.sha256()
    counted = _count(tokenize(documents, tokenizer, config.max_tokens), result, digest, tokenizer)
    reader = Reader(model, form, chunk=chunk)
    if stride is None:
        tally = _stream(reader, counted, length, config.batch_size)
    else:
        spans = itertools.chain.from_iterable(windows(ids, length, stride) for ids in counted)
        tally = _score(reader, spans, config.batch_size)
    result.by_context = tally.bins
    result.nll = sum(part.nll for part in result.by_context)
    scored = sum(part.tokens for part in result.by_context)
    if not result.tokens:
        raise ConfigError("perplexity.sources", config.sources, "hold no text to score.")
    assert scored == result.tokens, f"scored {scored} of {result.tokens} tokens"
    result.text_sha256 = digest.hexdigest()
    return result


def tokenize(
    documents: Iterable[str], tokenizer: Tokenizer, max_tokens: int | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Yield each document's text with its ids, separator not included, up to a limit.

    The document that would pass the limit is cut where its text and its ids agree, so that words
    and bytes are those of what is scored. Documents are encoded many at a time, on all cores, while
    those before them are used: one after the other, a GPU would wait for them.
    """
    left = math.inf if max_tokens is None else max_tokens
    for text, ids in _encoded_ahead(documents, tokenizer):
        if len(ids) > left:
            # A character whose bytes are cut in two decodes to U+FFFD, which is no part of it.
            text = tokenizer.decode(ids[: int(left)]).rstrip("\ufffd")
            [ids] = _encode(tokenizer, [text])
            left = 0
        left -= len(ids)
        if ids:
            yield text, ids
        if left <= 0:
            return


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[Span]:
    """Cut one document into windows that score each of its tokens once.

    Args:
        ids: The document, its separator first.
        length: Tokens in a window.
        stride: Tokens between the beginnings of windows, at most ``length``. From the second window
            on only the last ``stride`` positions are scored.
    """
    inputs, labels = ids[:-1], ids[1:]
    start = scored = 0
    while scored < len(labels):
        stop = min(start + length, len(labels))
        context = scored - start
        yield Span(
            list(inputs[start:stop]), [IGNORED] * context + list(labels[start + context : stop])
        )
        scored = stop
        start += stride


def _count(
    documents: Iterable[tuple[str, list[int]]],
    result: PerplexityResult,
    digest: hashlib._Hash,
    tokenizer: Tokenizer,
) -> Iterator[list[int]]:
    """Yield each document's ids behind its separator, adding up what they stand for."""
    for text, ids in documents:
        encoded = text.encode()
        # The length first, so that the digest tells where documents end.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        result.documents += 1
        result.tokens += len(ids)
        result.words += len(text.split())
        result.bytes += len(encoded)
        yield [tokenizer.eos_id, *ids]


def _score(reader: Reader, spans: Iterable[Span], batch_size: int) -> Tally:
    """Add up windows that begin from nothing."""
    tally = Tally()
    # Sorted in stretches, so that windows of a batch are of like length.
    for stretch in _batched(spans, batch_size * _SORTED_BATCHES):
        stretch.sort(key=lambda span: len(span.input_ids), reverse=True)
        for batch in _batched(stretch, batch_size):
            inputs_bl = pad([span.input_ids for span in batch], 0)
            labels_bl = pad([span.labels for span in batch], IGNORED)
            tally.add(reader.losses(inputs_bl, labels_bl)[0], labels_bl)
    return tally


def _stream(reader: Reader, documents: Iterable[list[int]], length: int, batch_size: int) -> Tally:
    """Add up stretches of documents read with carried state."""
    tally = Tally()
    for group in _batched(documents, batch_size):
        group.sort(key=len, reverse=True)
        state = reader.model.new_state(len(group))
        for start in range(0, len(group[0]) - 1, length):
            # Documents that have ended are the last ones and leave the batch.
            alive = sum(len(ids) - 1 > start for ids in group)
            if alive < len(group):
                group, state = group[:alive], state.rows(range(alive))
            stops = [min(start + length, len(ids) - 1) for ids in group]
            inputs = [ids[start:stop] for ids, stop in zip(group, stops, strict=True)]
            labels = [ids[start + 1 : stop + 1] for ids, stop in zip(group, stops, strict=True)]
            labels_bl = pad(labels, IGNORED)
            loss_bl, after = reader.losses(pad(inputs, 0), labels_bl, state)
            assert after is not None
            state = after
            tally.add(loss_bl, labels_bl, start)
    return tally


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _encoded_ahead(
    documents: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[str, list[int]]]:
    """Yield each document with its ids, the next group being encoded meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
        waiting: list[tuple[list[str], Future[list[list[int]]]]] = []
        for texts in _grouped(documents, _GROUP_CHARACTERS):
            waiting.append((texts, thread.submit(_encode, tokenizer, texts)))
            if len(waiting) > 1:
                group, ids = waiting.pop(0)
                yield from zip(group, ids.result(), strict=True)
        for group, ids in waiting:
            yield from zip(group, ids.result(), strict=True)


def _grouped(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield documents in groups of at least so many characters, the last one excepted."""
    group: list[str] = []
    held = 0
    for text in documents:
        group.append(text)
        held += len(text)
        if held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, long ones encoded in pieces."""
    pieces = [tokenizer.pieces(text) for text in texts]
    ids = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(pieces))))
    return [
        list(itertools.chain.from_iterable(itertools.islice(ids, len(each)))) for each in pieces
    ]


def _open(sources: Sequence[object], key: str, cache_dir: str | None) -> list[Source]:
    cache = make_cache(cache_dir)
    keys = [f"{key}[{i}]" for i in range(len(sources))]
    return [
        Source(parse_source(value, name), name, cache)
        for value, name in zip(sources, keys, strict=True)
    ]


def _exp(nll: float, count: int) -> float:
    try:
        return math.exp(nll / count)
    except (OverflowError, ZeroDivisionError):
        return math.inf
