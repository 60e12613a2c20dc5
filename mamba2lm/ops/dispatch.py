"""Which implementation of an operator runs, and the checks that every operator shares."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]

IMPLEMENTATIONS: tuple[str, ...] = ("auto", "triton", "reference")

# The hand-written CPU paths are tuned for these; float64 exists for checking and takes the
# reference, which can also be differentiated twice.
CPU_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


NO_KERNEL = "this version has none"


_taken: dict[str, set[str]] = {}


def note_taken(operator: str, what: str) -> None:
    """Remember what an operator ran on, for ``implementations_taken``."""
    if not torch.compiler.is_compiling():
        _taken.setdefault(operator, set()).add(what)


def implementations_taken() -> str:
    """Return what every operator has run on so far in this process, in words, for a log."""
    return ", ".join(f"{name} {' and '.join(sorted(_taken[name]))}" for name in sorted(_taken))


def choose_impl(
    operator: str,
    impl: str,
    tensor: Tensor,
    *,
    cpu: bool = False,
    unsupported: str | None = NO_KERNEL,
) -> Literal["triton", "reference", "cpu"]:
    """Resolve the ``impl`` argument of an operator to the implementation that will run.

    Args:
        operator: The operator's public name, for the error message.
        impl: ``"auto"`` (the fastest there is), ``"triton"`` or ``"reference"``.
        tensor: The operator's main input; its device and dtype decide what ``"auto"`` means.
        cpu: Whether the operator has a hand-written CPU path for float32 and bfloat16.
        unsupported: Why the operator's kernels cannot take these inputs; None when they can.

    Returns:
        For ``"auto"``: ``"triton"`` on a GPU where the kernels apply, ``"cpu"`` where that path
        does, else ``"reference"``.

    Raises:
        ValueError: An unknown name, or ``"triton"`` for inputs that no kernel takes.
    """
    chosen = _choose(operator, impl, tensor, cpu, unsupported)
    note_taken(operator, chosen)
    return chosen


def _choose(
    operator: str, impl: str, tensor: Tensor, cpu: bool, unsupported: str | None
) -> Literal["triton", "reference", "cpu"]:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operator}: impl={impl!r} is unknown; use one of {IMPLEMENTATIONS}.")
    if impl == "triton":
        if unsupported is None:
            return "triton"
        raise ValueError(
            f"{operator}: impl='triton' was asked for, but no Triton kernel takes this: "
            f"{unsupported}; use impl='auto' or impl='reference'."
        )
    if impl == "auto" and tensor.is_cuda and unsupported is None:
        return "triton"
    if impl == "auto" and cpu and tensor.device.type == "cpu" and tensor.dtype in CPU_DTYPES:
        return "cpu"
    return "reference"


def expect_shape(name: str, tensor: Tensor, axes: str, sizes: dict[str, int]) -> None:
    """Check a tensor against named axes, learning the size of an axis when it is first met.

    Args:
        name: The argument's public name.
        tensor: The tensor to check.
        axes: Axis names separated by spaces, e.g. ``"b l h p"``.
        sizes: Sizes known so far; names of ``axes`` that are missing are added.

    Raises:
        ValueError: Wrong number of axes or an axis of another size than the one known.
    """
    names = axes.split()
    shape = tuple(tensor.shape)
    if len(names) == len(shape) and all(
        sizes.get(axis, size) == size for axis, size in zip(names, shape, strict=True)
    ):
        sizes.update(zip(names, shape, strict=True))
        return
    wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
    raise ValueError(f"{name} has shape {shape}; expected ({wanted}).")


def state_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of states, decays and accumulation: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
