"""What one mixer carries from token to token: a named container of tensors, batch first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor


class State:
    """Hold named tensors whose first axis is the batch row.

    Copying, saving, selecting and joining rows need nothing else of a mixer, so sessions, prefix
    caches and batches that requests join and leave are built on this class alone.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}: {tuple(v.shape)} {v.dtype}" for k, v in self.tensors.items())
        return f"{type(self).__name__}({inside})"

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def tokens(self) -> int:
        """Tokens that the longest row has kept something of each of; 0 where none are."""
        return 0

    def replace(self, **tensors: Tensor) -> Self:
        """Return a state of the same kind with some tensors exchanged."""
        return type(self)(**{**self.tensors, **tensors})

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """Return copies of the rows ``index`` (repeats allowed), in that order."""
        return type(self)(
            **{
                name: tensor.index_select(0, torch.as_tensor(index, device=tensor.device))
                for name, tensor in self.tensors.items()
            }
        )

    def row(self, index: int, tokens: int) -> State:
        """Return a copy of row ``index``, which has read at most ``tokens`` tokens."""
        return self.replace(
            **{name: tensor[index : index + 1].clone() for name, tensor in self.tensors.items()}
        )

    def put(self, index: int, row: State) -> None:
        """Overwrite row ``index`` with a state of one row, in this state's dtypes."""
        for name, tensor in self.tensors.items():
            tensor[index].copy_(row[name][0])

    def first(self, rows: int, tokens: int) -> State:
        """Return views of the first rows, for steps after which none has read over ``tokens``.

        A step writes through them. Rows beyond those in use may hold anything.
        """
        return type(self)(**{name: tensor[:rows] for name, tensor in self.tensors.items()})

    def keep(self, stepped: State) -> None:
        """Take over what a step on a ``first`` view returned, where it is not in place."""
        for name, tensor in self.tensors.items():
            if tensor.data_ptr() != stepped[name].data_ptr():
                tensor.copy_(stepped[name])

    def clone(self) -> Self:
        """Return a copy that later steps do not change."""
        return type(self)(**{name: tensor.clone() for name, tensor in self.tensors.items()})

    def detach(self) -> Self:
        """Return the same values without their history of gradients."""
        return type(self)(**{name: tensor.detach() for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Self:
        """Return the state on ``device``."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self.tensors.items()})

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        """Join the rows of several states of one mixer."""
        return cls(
            **{name: torch.cat([state[name] for state in states]) for name in states[0].tensors}
        )

    def load(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return a state of this kind holding ``tensors``, whose names and kinds must match.

        Raises:
            ValueError: A name is missing or unexpected, or a tensor has another rank or dtype.
        """
        if set(tensors) != set(self.tensors):
            raise ValueError(f"state has {sorted(tensors)}, expected {sorted(self.tensors)}")
        for name, mine in self.tensors.items():
            theirs = tensors[name]
            if mine.dtype != theirs.dtype or not self._fits(name, mine, theirs):
                raise ValueError(
                    f"state tensor {name} is {tuple(theirs.shape)} {theirs.dtype}, "
                    f"expected {tuple(mine.shape)} {mine.dtype} (any batch)"
                )
        return type(self)(**{name: tensors[name] for name in self.tensors})

    def _fits(self, name: str, mine: Tensor, theirs: Tensor) -> bool:
        return mine.shape[1:] == theirs.shape[1:]
