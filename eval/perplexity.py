"""How well a model predicts text, by three kinds of context.

A document is read as its separator followed by its tokens; every token of the text is predicted
exactly once, the separator never. So the three kinds score the same tokens and their figures
compare, and a document's first token is predicted from the separator alone.

Axes: b window, l position.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor

from eval.config import PerplexityConfig, Window
from mamba2lm.data import IGNORED, DataConfig, DataKind, Tokenizer
from mamba2lm.data.shards import make_cache
from mamba2lm.data.sources import Part, Source, find_cut, parse_source, split_documents
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError

T = TypeVar("T")

# Windows are sorted by length within this many batches.
_SORTED_BATCHES: Final = 16


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


def held_out_documents(data: DataConfig) -> Iterator[str]:
    """Yield the text that a run with this data config does not train on.

    Raises:
        ConfigError: The run has no text, held none out, or its sources cannot be read.
    """
    if data.kind is not DataKind.text:
        raise ConfigError(
            "perplexity.sources", [], "the run has no text of its own; name some text to score."
        )
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
        raise ConfigError(
            "perplexity.sources", [], "the run held no text out; name some text to score."
        )


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
) -> PerplexityResult:
    """Score documents.

    Args:
        model: On the device it shall run on.
        tokenizer: The one it was trained with.
        documents: Texts, read once; empty ones count for nothing.
        config: Kind of context; must be valid.
        length: Window length where the config has none.

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
    elif state_grows(model):
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
    if stride is None:
        totals = _stream(model, counted, length, config.batch_size)
    else:
        spans = itertools.chain.from_iterable(windows(ids, length, stride) for ids in counted)
        totals = _score(model, spans, config.batch_size)
    scored = 0
    for nll, tokens in totals:
        result.nll += nll
        scored += tokens
    if not result.tokens:
        raise ConfigError("perplexity.sources", config.sources, "hold no text to score.")
    assert scored == result.tokens, f"scored {scored} of {result.tokens} tokens"
    result.text_sha256 = digest.hexdigest()
    return result


def state_grows(model: LanguageModel) -> bool:
    """Return whether the model's state takes more memory after a token than before."""
    with torch.inference_mode():
        state = model.new_state(1)
        before = state.nbytes
        ids_bl = torch.zeros(1, 1, dtype=torch.int64, device=model.embedding.weight.device)
        after = model(ids_bl, state=state, last_only=True).state
    assert after is not None
    return after.nbytes > before


def tokenize(
    documents: Iterable[str], tokenizer: Tokenizer, max_tokens: int | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Yield each document's text with its ids, separator not included, up to a limit.

    The document that would pass the limit is cut where its text and its ids agree, so that words
    and bytes are those of what is scored.
    """
    left = math.inf if max_tokens is None else max_tokens
    for text in documents:
        ids = _encode(tokenizer, text)
        if len(ids) > left:
            # A character whose bytes are cut in two decodes to U+FFFD, which is no part of it.
            text = tokenizer.decode(ids[: int(left)]).rstrip("\ufffd")
            ids = _encode(tokenizer, text)
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


def _score(
    model: LanguageModel, spans: Iterable[Span], batch_size: int
) -> Iterator[tuple[float, int]]:
    """Yield NLL and number of labels of each batch of windows that begin from nothing."""
    device = model.embedding.weight.device
    # Sorted in stretches, so that windows of a batch are of like length.
    for stretch in _batched(spans, batch_size * _SORTED_BATCHES):
        stretch.sort(key=lambda span: len(span.input_ids), reverse=True)
        for batch in _batched(stretch, batch_size):
            inputs_bl = _pad([span.input_ids for span in batch], 0, device)
            labels_bl = _pad([span.labels for span in batch], IGNORED, device)
            with torch.inference_mode():
                output = model(inputs_bl, labels=labels_bl, loss_reduction="none")
            yield _total(output.loss, labels_bl)


def _stream(
    model: LanguageModel, documents: Iterable[list[int]], length: int, batch_size: int
) -> Iterator[tuple[float, int]]:
    """Yield NLL and number of labels of each stretch of documents read with carried state."""
    device = model.embedding.weight.device
    for group in _batched(documents, batch_size):
        group.sort(key=len, reverse=True)
        state = model.new_state(len(group))
        for start in range(0, len(group[0]) - 1, length):
            # Documents that have ended are the last ones and leave the batch.
            alive = sum(len(ids) - 1 > start for ids in group)
            if alive < len(group):
                group, state = group[:alive], state.rows(range(alive))
            stops = [min(start + length, len(ids) - 1) for ids in group]
            inputs = [ids[start:stop] for ids, stop in zip(group, stops, strict=True)]
            labels = [ids[start + 1 : stop + 1] for ids, stop in zip(group, stops, strict=True)]
            inputs_bl, labels_bl = _pad(inputs, 0, device), _pad(labels, IGNORED, device)
            with torch.inference_mode():
                output = model(inputs_bl, labels=labels_bl, state=state, loss_reduction="none")
            assert output.state is not None
            state = output.state
            yield _total(output.loss, labels_bl)


def _total(loss_bl: Tensor | None, labels_bl: Tensor) -> tuple[float, int]:
    assert loss_bl is not None
    scored_bl = labels_bl != IGNORED
    return float(loss_bl.double()[scored_bl].sum()), int(scored_bl.sum())


def _pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Return rows as (b, l), filled up on the right, where a causal model sees nothing of it."""
    length = max(len(row) for row in rows)
    filled = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(itertools.chain.from_iterable(tokenizer.encode_batch(list(tokenizer.pieces(text)))))


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
