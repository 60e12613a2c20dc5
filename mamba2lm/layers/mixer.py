"""The protocol of a mixer: what sits inside one residual sub-layer ``x + mixer(norm(x))``.

Axes: b batch, l length, d model width.

A new mixer is a dataclass config and a class in one file of this folder, decorated with
``@register``; ``docs/add-a-mixer.md`` walks through one. The contract tests in
``tests/layers/test_contract.py`` run over the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mamba2lm.distributed import Plan, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers.norm import RMSNorm
from mamba2lm.layers.state import State
from mamba2lm.schema import ConfigError, closest


@dataclass
class MixerConfig:
    """Base of every mixer's configuration."""

    def validate(self, d_model: int, key: str) -> None:
        """Check the fields against each other and the model width.

        Args:
            d_model: Model width.
            key: Dotted config key of this mixer, e.g. ``model.mixers.M``.

        Raises:
            ConfigError: Naming the field, its value and the remedy.
        """


class Mixer(nn.Module, ABC):
    """Map a sequence to a sequence of the same shape, causally, with a state that continues it."""

    config_class: ClassVar[type[MixerConfig]]
    type_name: ClassVar[str]
    default_letter: ClassVar[str]
    constant_state: ClassVar[bool] = True
    """Whether the state's size is independent of how many tokens it has seen."""
    recurrent_tensors: ClassVar[tuple[str, ...]] = ()
    """Tensors of the state that a recurrence accumulates; float32 unless asked otherwise."""
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that are never cast below float32 and never decayed."""
    supports_context: ClassVar[bool] = False
    """Whether ``forward`` takes ``context``."""
    one_node_on_gpu: ClassVar[bool] = False
    """Whether training on a GPU runs the mixer as one autograd node of kernels, which
    torch.compile would take apart and find nothing in to fuse."""

    d_model: int
    tensor: TensorGroup | None = None
    """Whom the mixer's heads are shared with; its sizes are then those of this process's part."""
    keep_outputs: bool = False
    """Whether training keeps for the backward pass what would be cheap to make again."""

    @abstractmethod
    def forward(
        self,
        x_bld: Tensor,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        """Run a whole stretch of tokens: training, prefill and chunked prefill alike.

        Args:
            x_bld: (batch, length, d_model), length ≥ 1.
            state: What came before, as a fresh ``new_state`` or one returned earlier; None when
                nothing came before and no state is wanted back. Never changed in place, and
                gradients flow through it.
            seq_idx_bl: (batch, length) integers; the sequence restarts wherever the value differs
                from the one before. ``state`` belongs to the document at position 0.
            context: Given where other processes have the rest of each sequence (then ``state`` is
                None); see ``mamba2lm/distributed/context.py``.

        Returns:
            Output (batch, length, d_model), and the state after the last token (None if none was
            passed).
        """

    def forward_divided(
        self,
        x_bld: Tensor,
        tensor: TensorGroup,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        """Run this process's part; return what all parts together give.

        Args:
            x_bld: What every process has the same of, or its stretch where sequences are split.
            tensor: The processes.
            state: As ``forward``, this process's part of it.
            seq_idx_bl: As ``forward``.
            context: As ``forward``.
        """
        given = {} if context is None else {"context": context}
        y_bld, state = self(tensor.enter(x_bld), state, seq_idx_bl=seq_idx_bl, **given)
        return tensor.leave(y_bld), state

    @abstractmethod
    def step(self, x_bd: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one token; may overwrite ``state``'s tensors (``clone`` it to keep it).

        Args:
            x_bd: (batch, d_model).
            state: What came before.

        Returns:
            Output (batch, d_model) and the state after it.
        """

    def step_block(self, x_bd: Tensor, norm: RMSNorm, state: State) -> tuple[Tensor, State]:
        """Run one token through the whole residual sub-layer, ``x + step(norm(x))``.

        A mixer may do so in fewer passes than one for each part, and may overwrite ``x_bd``.

        Args:
            x_bd: The residual stream, (batch, d_model).
            norm: The sub-layer's.
            state: As for ``step``.
        """
        y_bd, state = self.step(norm(x_bd), state)
        return x_bd + y_bd, state

    @abstractmethod
    def new_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        """Return the state before any token.

        Args:
            batch: Number of rows.
            dtype: Dtype of activations kept as they are (conv inputs, keys, values); default that
                of the weights. Recurrent states are float32 (float64 for float64) whatever it is.
            device: Default: that of the weights.
        """

    def reserve(self, state: State, tokens: int) -> State:
        """Return the state with room for rows of ``tokens`` tokens, where it is not constant."""
        return state

    @abstractmethod
    def init_weights(self) -> None:
        """Initialise every parameter in place, from torch's global random state."""

    @abstractmethod
    def residual_weight(self) -> Tensor:
        """Return the projection that writes to the residual stream (rescaled by depth at init)."""

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Return forward FLOPs per token in sequences of ``length`` (a multiply-add is two).

        Counts matrix products and convolutions, as the reference operators perform them.
        """

    def kept_bytes_per_token(self, itemsize: int) -> int:
        """Return the bytes a token that ``keep_outputs`` holds until the backward pass.

        Args:
            itemsize: Bytes of an element of what the mixer computes in.
        """
        return 0

    def tensor_plan(self) -> Plan | None:
        """Return how each parameter divides over processes, or None if the mixer cannot.

        Data only; called on a whole mixer. What ``forward`` and ``step`` return is then added up
        over the processes, outside.
        """
        return None

    def take_part(self, tensor: TensorGroup) -> None:
        """Set the sizes to those of this process's part, and ``tensor`` for sums inside."""
        raise NotImplementedError(f"{self.type_name} has no tensor_plan")


M = TypeVar("M", bound=type[Mixer])
_REGISTRY: dict[str, type[Mixer]] = {}


def register(name: str, *, letter: str) -> Callable[[M], M]:
    """Register a mixer class under ``name``, with the pattern letter it has by default."""

    def add(cls: M) -> M:
        taken = {c.default_letter: n for n, c in _REGISTRY.items()}
        assert name not in _REGISTRY, f"mixer {name} is registered twice"
        assert letter not in taken, f"letter {letter} belongs to mixer {taken.get(letter)}"
        cls.type_name, cls.default_letter = name, letter
        _REGISTRY[name] = cls
        return cls

    return add


def registered_mixers() -> dict[str, type[Mixer]]:
    """Return every registered mixer class by name."""
    return dict(_REGISTRY)


def mixer_class(name: Any, key: str) -> type[Mixer]:
    """Look a mixer up by name.

    Args:
        name: Registered name, e.g. ``"mamba2"``.
        key: Config key that held it, for the error.

    Raises:
        ConfigError: No such mixer.
    """
    if name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise ConfigError(
            key, name, f"no mixer of that name.{closest(str(name), _REGISTRY)} Known: {known}."
        )
    return _REGISTRY[name]


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise ``ConfigError(key, value, remedy)`` unless ``condition``."""
    if not condition:
        raise ConfigError(key, value, remedy)


def output_and_state(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Split what an operator returns with or without ``return_final_states``."""
    return result if isinstance(result, tuple) else (result, None)


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of recurrent states beside weights of ``dtype``: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
