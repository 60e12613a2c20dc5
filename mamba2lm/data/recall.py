"""Multi-query associative recall (MQAR), the synthetic task of Zoology.

A sequence states pairs of a key and a value, then asks for every key once more; the answer is its
value. Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023,
section 4 and appendix; Dao and Gu, "Transformers are SSMs", 2024, figure 8.

Legend: b examples, l positions, k pairs, s slots for queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mamba2lm.data.packing import IGNORED
from mamba2lm.data.sampler import generator
from mamba2lm.schema import ConfigError

_BLOCK: Final = 256
_KEPT_BLOCKS: Final = 4

IntArray = npt.NDArray[np.int64]


@dataclass
class RecallConfig:
    """The task's shape.

    Attributes:
        vocab_size: Even; keys are drawn from the lower half without 0, values from the upper half.
        length: Positions in a sequence; even.
        n_pairs: Pairs of key and value, each asked for once; at most a quarter of ``length``.
        power_a: Slot i of the questions has a probability proportional to i^(power_a − 1).
        n_train: Different training examples; an epoch is this long.
        n_test: Held-out examples.
    """

    vocab_size: int = 8192
    length: int = 256
    n_pairs: int = 16
    power_a: float = 0.01
    n_train: int = 100_000
    n_test: int = 3_000


def check_recall(config: RecallConfig, key: str = "data.recall") -> None:
    """Refuse a task that cannot be generated.

    Args:
        config: The task.
        key: Its config key, for error messages.

    Raises:
        ConfigError: Odd sizes, more pairs than fit, or a vocabulary without enough keys.
    """
    if config.vocab_size < 4 or config.vocab_size % 2:
        raise ConfigError(f"{key}.vocab_size", config.vocab_size, "use an even number, 4 or more.")
    if config.length < 4 or config.length % 2:
        raise ConfigError(f"{key}.length", config.length, "use an even number, 4 or more.")
    if not 1 <= config.n_pairs <= config.length // 4:
        raise ConfigError(
            f"{key}.n_pairs",
            config.n_pairs,
            "every pair takes two positions and its question two more: use 1 to "
            f"{config.length // 4} for length {config.length}.",
        )
    if config.n_pairs > config.vocab_size // 2 - 1:
        raise ConfigError(
            f"{key}.vocab_size",
            config.vocab_size,
            f"it has {config.vocab_size // 2 - 1} keys for {config.n_pairs} pairs; use at least "
            f"{2 * config.n_pairs + 2}.",
        )
    if config.power_a <= 0:
        raise ConfigError(f"{key}.power_a", config.power_a, "use a number above 0.")
    for name in ("n_train", "n_test"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{key}.{name}", getattr(config, name), "use 1 or more.")


def generate_recall(
    n_examples: int, config: RecallConfig, *, seed: int, purpose: str = "test"
) -> tuple[Tensor, Tensor]:
    """Generate examples of the task.

    Args:
        n_examples: How many.
        config: The task's shape; its ``n_train`` and ``n_test`` do not matter here.
        seed: The same seed gives the same examples, and fewer give the first of more.
        purpose: ``"train"`` and ``"test"`` give different examples from the same seed.

    Returns:
        ``input_ids`` and ``labels``, both int64 (n_examples, length). ``labels[b, t]`` is what the
        model must give out at position t itself, having read ``input_ids[b, : t + 1]``: no further
        shift. It is −100 wherever nothing is asked.

    Raises:
        ConfigError: As `check_recall`.
    """
    check_recall(config)
    inputs_bl = np.empty((n_examples, config.length), dtype=np.int64)
    labels_bl = np.empty_like(inputs_bl)
    for block, start in enumerate(range(0, n_examples, _BLOCK)):
        count = min(_BLOCK, n_examples - start)
        inputs, labels = _recall_block(config, seed, purpose, block)
        inputs_bl[start : start + count] = inputs[:count]
        labels_bl[start : start + count] = labels[:count]
    return torch.from_numpy(inputs_bl), torch.from_numpy(labels_bl)


class RecallTraining:
    """The task as training samples: ``n_train`` examples, in a new order every epoch.

    The order shuffles blocks of 256 examples and the examples in each; examples are drawn
    independently, so nothing is lost, and one block is generated at a time.
    """

    def __init__(self, config: RecallConfig, *, seed: int) -> None:
        """Describe the task; nothing is generated yet.

        Args:
            config: The task's shape.
            seed: The run's seed.
        """
        check_recall(config)
        self.config = config
        self.seed = seed
        self.tokens = config.n_train * config.length
        self._blocks: dict[int, tuple[IntArray, IntArray]] = {}
        self._orders: dict[int, IntArray] = {}

    @property
    def fingerprint(self) -> str:
        """Return what decides every sample: the task and the seed."""
        return f"recall {self.config} seed {self.seed}"

    def describe(self) -> dict[str, object]:
        """Return the task's figures for a log."""
        return {
            "sources": ["recall"],
            "documents": self.config.n_train,
            "tokens": self.tokens,
            "bytes": 0,
        }

    def sample(self, global_index: int) -> dict[str, Tensor]:
        """Return a sample by its number in the run: ``input_ids``, ``labels``, int64 (length,)."""
        epoch, position = divmod(global_index, self.config.n_train)
        block, row = divmod(self._example(epoch, position), _BLOCK)
        if block not in self._blocks:
            while len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = _recall_block(self.config, self.seed, "train", block)
        inputs_bl, labels_bl = self._blocks[block]
        return {
            "input_ids": torch.from_numpy(inputs_bl[row].copy()),
            "labels": torch.from_numpy(labels_bl[row].copy()),
        }

    def _example(self, epoch: int, position: int) -> int:
        if epoch not in self._orders:
            random = generator(self.seed, "recall order", epoch)
            starts = np.arange(0, self.config.n_train, _BLOCK)
            random.shuffle(starts)
            blocks = (np.arange(s, min(s + _BLOCK, self.config.n_train)) for s in starts)
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.concatenate([random.permutation(block) for block in blocks])
        return int(self._orders[epoch][position])

    def __getstate__(self) -> dict[str, object]:
        # What is generated on demand need not travel to a worker process.
        return {**self.__dict__, "_blocks": {}, "_orders": {}}


class RecallValidation:
    """The held-out examples of the task."""

    def __init__(self, config: RecallConfig, *, seed: int) -> None:
        """Generate ``n_test`` examples that the training set does not draw.

        Args:
            config: The task's shape.
            seed: The run's seed.
        """
        self._inputs_bl, self._labels_bl = generate_recall(config.n_test, config, seed=seed)
        self.tokens = config.n_test * config.n_pairs
        self.bytes = 0

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._inputs_bl.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return example ``index``: ``input_ids`` and ``labels``, int64 (length,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self._inputs_bl[index], "labels": self._labels_bl[index]}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield every example."""
        return (self[index] for index in range(len(self)))

    def padding(self) -> dict[str, Tensor]:
        """Return an example in which nothing is asked."""
        labels_l = torch.full_like(self._labels_bl[0], IGNORED)
        return {"input_ids": self._inputs_bl[0], "labels": labels_l}


def _recall_block(
    config: RecallConfig, seed: int, purpose: str, block: int
) -> tuple[IntArray, IntArray]:
    """Generate block ``block`` of 256 examples."""
    random = generator(seed, f"recall {purpose}", block)
    n_pairs, half = config.n_pairs, config.vocab_size // 2
    stated = 2 * n_pairs
    keys_bk = 1 + _distinct(random, half - 1, n_pairs)
    values_bk = half + _distinct(random, config.vocab_size - half, n_pairs)
    inputs_bl = random.integers(config.vocab_size, size=(_BLOCK, config.length))
    inputs_bl[:, 0:stated:2] = keys_bk
    inputs_bl[:, 1:stated:2] = values_bk

    # Drawing slots one after another without replacement, in proportion to their weights, is the
    # order in which exponential clocks with those rates ring (Efraimidis and Spirakis, 2006).
    n_slots = (config.length - stated) // 2
    weight_s = np.arange(1, n_slots + 1, dtype=np.float64) ** (config.power_a - 1.0)
    rings_bs = random.standard_exponential((_BLOCK, n_slots)) / weight_s
    slots_bk = np.argsort(rings_bs, axis=1)[:, :n_pairs]
    asked_bk = stated + 2 * slots_bk
    np.put_along_axis(inputs_bl, asked_bk, keys_bk, axis=1)
    labels_bl = np.full((_BLOCK, config.length), IGNORED, dtype=np.int64)
    np.put_along_axis(labels_bl, asked_bk, values_bk, axis=1)
    return inputs_bl, labels_bl


def _distinct(random: np.random.Generator, choices: int, count: int) -> IntArray:
    """Draw ``count`` different numbers below ``choices`` for every row, in uniform order.

    The first steps of a Fisher–Yates shuffle, all rows at once.
    """
    deck = np.tile(np.arange(choices), (_BLOCK, 1))
    rows = np.arange(_BLOCK)
    for position in range(count):
        other = random.integers(position, choices, size=_BLOCK)
        taken = deck[rows, other]
        deck[rows, other] = deck[:, position]
        deck[:, position] = taken
    return deck[:, :count].copy()
