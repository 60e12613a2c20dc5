"""Samples by number → the batches of a process, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class TrainingSamples(Protocol):
    """Training samples by their number in the run.

    Attributes:
        tokens: Tokens in one pass over everything.
    """

    tokens: int

    @property
    def fingerprint(self) -> str:
        """Return a digest of everything that decides the samples."""
        ...

    def sample(self, global_index: int) -> dict[str, Tensor]:
        """Return one sample: ``input_ids``, ``labels`` and perhaps ``seq_idx``, each (L,)."""
        ...

    def describe(self) -> dict[str, object]:
        """Return sources, documents, tokens and bytes, for a log."""
        ...


class ValidationSamples(Protocol):
    """Samples to validate on, in a fixed order.

    Attributes:
        tokens: Labels counted over all samples.
        bytes: UTF-8 bytes of the text they stand for; 0 for a task that is not text.
    """

    tokens: int
    bytes: int

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample, as `TrainingSamples.sample`."""
        ...

    def padding(self) -> dict[str, Tensor]:
        """Return a sample without any label."""
        ...


def training_batches(
    samples: TrainingSamples,
    *,
    start: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's batches, without end.

    Micro-step k gives rank r the global samples ``start + (k · world_size + r) · micro_batch`` and
    the ``micro_batch − 1`` after it: one process with ``micro_batch · world_size`` sees the same.

    Args:
        samples: The samples.
        start: Global index of the first sample; on resume, how many were consumed.
        micro_batch: Samples a process takes at a time.
        rank: This process among those that hold different samples.
        world_size: How many those are.
        num_workers: Processes that read ahead; the batches are the same whatever the number.
        pin_memory: Put batches in page-locked memory (only with CUDA).

    Returns:
        An iterator of ``input_ids``, ``labels`` and perhaps ``seq_idx``, each (micro_batch, L).
    """
    batches = _MicroBatches(samples, start, micro_batch, rank, world_size)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_Counting(),
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        # The loader draws a seed for its workers: not from the run's own random numbers.
        generator=torch.Generator(),
    )
    return iter(loader)


def validation_batches(
    samples: ValidationSamples,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_batches: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's share of the validation samples, the same number on every process.

    Args:
        samples: The samples.
        batch_size: Rows in a batch, on each process.
        rank: This process.
        world_size: How many processes share the samples.
        max_batches: Take only so many batches, of samples spread evenly over all.

    Returns:
        An iterator of batches as `training_batches` gives; rows beyond the last sample are padding
        whose labels are all −100.
    """
    step = batch_size * world_size
    wanted = len(samples)
    if max_batches is not None:
        wanted = min(wanted, max_batches * step)
    chosen = [number * len(samples) // wanted for number in range(wanted)]
    for begin in range(0, wanted, step):
        first = begin + rank * batch_size
        rows = [samples[index] for index in chosen[first : first + batch_size]]
        rows += [samples.padding() for _ in range(batch_size - len(rows))]
        yield _stack(rows)


class _Counting(Sampler[int]):
    """The indices 0, 1, 2 and so on, without end."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(2**62))


class _MicroBatches(Dataset[dict[str, Tensor]]):
    """One process's batch for every micro-step."""

    def __init__(
        self, samples: TrainingSamples, start: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self._samples = samples
        self._start = start
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = self._start + (index * self._world_size + self._rank) * self._micro_batch
        return _stack([self._samples.sample(first + row) for row in range(self._micro_batch)])


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
