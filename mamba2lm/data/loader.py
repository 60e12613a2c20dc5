"""From a data config to samples: prepare the corpus once, then draw samples by global index."""

from __future__ import annotations

import enum
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mamba2lm.data.batches import TrainingSamples, ValidationSamples
from mamba2lm.data.induction import InductionConfig
from mamba2lm.data.packing import PackedDataset
from mamba2lm.data.recall import RecallConfig
from mamba2lm.data.sampler import EpochOrder, Mixture, StreamOrder
from mamba2lm.data.selective_copying import SelectiveCopyingConfig
from mamba2lm.data.shards import TokenStore, make_cache, progress_bar, tokenize
from mamba2lm.data.sources import (
    Part,
    Source,
    digest,
    find_cut,
    parse_source,
    split_documents,
)
from mamba2lm.data.synthetic import SyntheticConfig, SyntheticTraining, SyntheticValidation
from mamba2lm.data.tokenizer import SPLIT_PATTERN, Tokenizer, TokenizerConfig, TokenizerKind
from mamba2lm.schema import ConfigError

logger = logging.getLogger(__name__)

# A BPE sees at most this much text, shared evenly among the sources.
_BPE_BYTES: Final = 512 * 2**20


class DataKind(enum.Enum):
    """What there is to learn from."""

    text = "text"
    recall = "recall"
    induction = "induction"
    selective_copying = "selective_copying"


@dataclass
class DataConfig:
    """What to train and validate on.

    Attributes:
        kind: Text, or one of the synthetic tasks.
        sources: Where text comes from: each a string (``austen``, ``hub:NAME``, a path, folder or
            glob) or a mapping of `SourceConfig`'s fields.
        validation_sources: Text to validate on; given, nothing is held out of ``sources``.
        validation_fraction: Last share of each source's bytes to hold out, in [0, 1).
        tokenizer: Which tokenizer.
        sequence_length: Tokens in a sample.
        reset_at_documents: Forget at document boundaries (samples carry ``seq_idx``); false carries
            state across them.
        recall: The task's shape, where ``kind`` is recall.
        induction: Likewise.
        selective_copying: Likewise.
        cache_dir: Where tokens are kept; null means ``$MAMBA2LM_CACHE`` or ``~/.cache/mamba2lm``.
        num_workers: Processes that read samples ahead; 0 reads in the training process.
    """

    kind: DataKind = DataKind.text
    sources: list[Any] = field(default_factory=lambda: ["austen"])
    validation_sources: list[Any] = field(default_factory=list)
    validation_fraction: float = 0.05
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 512
    reset_at_documents: bool = True
    recall: RecallConfig = field(default_factory=RecallConfig)
    induction: InductionConfig = field(default_factory=InductionConfig)
    selective_copying: SelectiveCopyingConfig = field(default_factory=SelectiveCopyingConfig)
    cache_dir: str | None = None
    num_workers: int = 0

    def synthetic(self) -> SyntheticConfig | None:
        """Return the synthetic task that ``kind`` names, None for text."""
        return None if self.kind is DataKind.text else getattr(self, self.kind.value)


@dataclass
class Corpus:
    """What `prepare_data` prepared.

    Attributes:
        tokenizer: None where the data are not text.
        vocab_size: Number of ids that can occur.
        sequence_length: Positions in a sample.
        train: Training samples.
        validation: None where nothing is held out.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    sequence_length: int
    train: TrainingSamples
    validation: ValidationSamples | None


class TextTraining:
    """Windows of text from one or more sources, mixed by weight and shuffled by epoch."""

    def __init__(
        self,
        names: Sequence[str],
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        config: DataConfig,
        *,
        seed: int,
        streams: int | None = None,
    ) -> None:
        """Set up the mixture.

        Args:
            names: The sources' names.
            stores: Their training tokens.
            weights: Their shares of the samples.
            config: Sequence length and resets.
            seed: The run's seed.
            streams: Given, sample g goes on where sample g − streams ended (``continues``).

        Raises:
            ConfigError: A source has fewer tokens than one window, or there are more sources than
                streams.
        """
        length = config.sequence_length
        self.tokens = sum(store.tokens for store in stores)
        self._names = list(names)
        self._packed = [
            PackedDataset(store, length, reset_at_documents=config.reset_at_documents)
            for store in stores
        ]
        for name, packed in zip(names, self._packed, strict=True):
            packed.require_a_window(name)
        self._mixture = Mixture(seed, weights)
        self._orders = [
            EpochOrder(seed, number, len(packed), length)
            for number, packed in enumerate(self._packed)
        ]
        self._streams = None
        if streams is not None:
            if streams < len(stores):
                raise ConfigError(
                    "training.batch_size",
                    streams,
                    f"with training.carry_state every one of the {len(stores)} sources needs a "
                    "row of its own; use as many or more.",
                )
            sizes = [len(packed) for packed in self._packed]
            self._streams = StreamOrder(seed, weights, sizes, streams)
        self._identity = [
            [store.sha256 for store in stores],
            self._mixture.counts,
            length,
            config.reset_at_documents,
            seed,
            *([] if streams is None else [f"{streams} streams"]),
        ]

    @property
    def fingerprint(self) -> str:
        """Return a digest of tokens, proportions, sequence length, resets and seed."""
        return digest(self._identity)

    def describe(self) -> dict[str, object]:
        """Return the sources' names and the sums of documents, tokens and bytes."""
        stores = [packed.store for packed in self._packed]
        return {
            "sources": self._names,
            "documents": sum(store.documents for store in stores),
            "tokens": self.tokens,
            "bytes": sum(store.bytes for store in stores),
        }

    def sample(self, global_index: int) -> dict[str, Tensor]:
        """Return sample ``global_index`` of the run, as `PackedDataset.sample`.

        With streams, as `PackedDataset.streamed_sample`.
        """
        if self._streams is not None:
            source, window = self._streams.window(global_index)
            return self._packed[source].streamed_sample(window)
        source, index = self._mixture.source(global_index)
        window, shift = self._orders[source].window(index)
        return self._packed[source].sample(window, shift)


class TextValidation:
    """Disjoint windows that cover the held-out tokens of every source once."""

    def __init__(self, stores: Sequence[TokenStore], config: DataConfig) -> None:
        """Lay the sources' windows one after another.

        Args:
            stores: Held-out tokens, each source with two or more.
            config: Sequence length and resets.
        """
        self._packed = [
            PackedDataset(
                store, config.sequence_length, reset_at_documents=config.reset_at_documents
            )
            for store in stores
        ]
        # The first separator of a source is never predicted.
        self.tokens = sum(store.tokens - 1 for store in stores)
        self.bytes = sum(store.bytes for store in stores)

    def __len__(self) -> int:
        """Return the number of windows."""
        return sum(packed.evaluation_windows for packed in self._packed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index``, as `PackedDataset.evaluation_sample`."""
        if index >= 0:
            for packed in self._packed:
                if index < packed.evaluation_windows:
                    return packed.evaluation_sample(index)
                index -= packed.evaluation_windows
        raise IndexError("no such window")

    def padding(self) -> dict[str, Tensor]:
        """Return a window of nothing but padding."""
        return self._packed[0].padding_sample()


def prepare_data(
    config: DataConfig,
    *,
    seed: int,
    tokenizer: Tokenizer | None = None,
    streams: int | None = None,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Corpus:
    """Read, tokenise and index the data, or find them in the cache.

    Args:
        config: The data.
        seed: The run's seed; it decides the order of the samples.
        tokenizer: Use this one (of the run that is resumed, of the model that is tuned) instead of
            what the config says.
        streams: Samples of a step whose states are carried to the next (training.carry_state): the
            text is then read in order, in so many places. None shuffles it.
        is_main: Whether this process does the work; the others find it done. Processes that share
            no cache folder each do it for themselves.
        wait: A barrier over all processes, called once.

    Returns:
        The tokenizer and the samples.

    Raises:
        ConfigError: A value that cannot be, a source that cannot be read, too little text.
    """
    _check(config)
    task = config.synthetic()
    if task is not None:
        if streams is not None:
            raise ConfigError(
                "training.carry_state", True, f"the examples of data.kind={config.kind.value} do "
                "not follow one another; use text, or false.",
            )  # fmt: skip
        wait()
        return Corpus(
            tokenizer=None,
            vocab_size=task.vocab_size,
            sequence_length=task.length,
            train=SyntheticTraining(task, seed=seed),
            validation=SyntheticValidation(task, seed=seed),
        )
    # Set before the library starts its threads: it would warn when a worker process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not is_main:
        wait()
    corpus = _prepare_text(config, seed, tokenizer, streams)
    if is_main:
        wait()
    return corpus


def _check(config: DataConfig) -> None:
    if not 0.0 <= config.validation_fraction < 1.0:
        raise ConfigError(
            "data.validation_fraction",
            config.validation_fraction,
            "use a share of at least 0 (nothing held out) and below 1.",
        )
    if config.sequence_length < 1:
        raise ConfigError("data.sequence_length", config.sequence_length, "use 1 or more.")
    if config.num_workers < 0:
        raise ConfigError("data.num_workers", config.num_workers, "use 0 or more.")
    if config.kind is DataKind.text and not config.sources:
        raise ConfigError(
            "data.sources", config.sources, "name at least one source, for example [austen]."
        )


def _prepare_text(
    config: DataConfig, seed: int, tokenizer: Tokenizer | None, streams: int | None
) -> Corpus:
    cache = make_cache(config.cache_dir)
    sources = _open_sources(config.sources, "data.sources", cache)
    # Opened now, so that a wrong path fails before the training text is tokenised.
    validation_sources = _open_sources(config.validation_sources, "data.validation_sources", cache)
    fraction = 0.0 if validation_sources else config.validation_fraction
    if tokenizer is None:
        tokenizer = make_tokenizer(config.tokenizer, sources, fraction, cache)
    parts = [tokenize(source, tokenizer, fraction, cache) for source in sources]
    held_out = [part[Part.validation] for part in parts]
    if validation_sources:
        held_out = [
            tokenize(source, tokenizer, 1.0, cache)[Part.validation]
            for source in validation_sources
        ]
    held_out = [store for store in held_out if store.tokens > 1]
    return Corpus(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.sequence_length,
        train=TextTraining(
            [source.name for source in sources],
            [part[Part.train] for part in parts],
            [source.config.weight for source in sources],
            config,
            seed=seed,
            streams=streams,
        ),
        validation=TextValidation(held_out, config) if held_out else None,
    )


def _open_sources(values: list[Any], key: str, cache: Path) -> list[Source]:
    keys = [f"{key}[{number}]" for number in range(len(values))]
    return [
        Source(parse_source(value, name), name, cache)
        for value, name in zip(values, keys, strict=True)
    ]


def make_tokenizer(
    config: TokenizerConfig, sources: Sequence[Source], fraction: float, cache: Path
) -> Tokenizer:
    """Make the tokenizer a config asks for; a trained BPE is kept in the cache.

    Args:
        config: Which tokenizer.
        sources: What a BPE is trained on.
        fraction: Share of each source that is held out, which a BPE never sees.
        cache: The cache's folder.

    Raises:
        ConfigError: No path for a pretrained tokenizer, or too small a vocabulary for a BPE.
    """
    if config.kind is TokenizerKind.bytes:
        return Tokenizer.of_bytes()
    if config.kind is TokenizerKind.pretrained:
        if not config.path:
            raise ConfigError(
                "data.tokenizer.path",
                config.path,
                "kind=pretrained needs a tokenizer.json file, its folder, or a hub name.",
            )
        return Tokenizer.load(config.path)
    if config.vocab_size is None or config.vocab_size < 257:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            config.vocab_size,
            "a BPE needs 257 or more: 256 bytes and the end-of-text token.",
        )
    identity = [
        SPLIT_PATTERN,
        config.vocab_size,
        fraction,
        [source.fingerprint() for source in sources],
    ]
    folder = cache / "tokenizers" / digest(identity)[:32]
    if not (folder / "tokenizer.json").is_file():
        _train_bpe(sources, fraction, config.vocab_size, folder)
    return Tokenizer.load(folder)


def _train_bpe(sources: Sequence[Source], fraction: float, vocab_size: int, folder: Path) -> None:
    logger.info("training a BPE of %d tokens", vocab_size)
    with progress_bar() as progress:
        task = progress.add_task("reading for the tokenizer", total=None)

        def texts() -> Iterator[str]:
            for source in sources:
                left = _BPE_BYTES // len(sources)
                cut = find_cut(source, fraction)
                for part, text in split_documents(source.documents(), cut):
                    if part is Part.validation or left <= 0:
                        break
                    size = len(text.encode())
                    left -= size
                    progress.update(task, advance=size)
                    yield text

        tokenizer = Tokenizer.train(texts(), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the text gives a BPE of only %d tokens, not %d", tokenizer.vocab_size, vocab_size
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        tokenizer.save(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process trained the same tokenizer first; use that.
            if not (folder / "tokenizer.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
