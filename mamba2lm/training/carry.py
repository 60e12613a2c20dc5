"""States carried from one training step to the next: truncated back-propagation through time.

Each row of the batch reads a text in order; its state goes on into the next step, its gradient does
not. A model trained so has seen states that come from far more text than one window, which is what
keeps it from failing beyond the length of its windows (Ruiz and Gu 2025, arXiv:2507.02782).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba2lm.distributed import Mesh, World
from mamba2lm.models import LanguageModel, ModelState
from mamba2lm.schema import ConfigError

CARRIED = "carried.safetensors"


class CarriedStates:
    """The states of this process's rows, one batch of them for each micro-step.

    They come and go as tensors by ``<layer>.<name>``.
    """

    def __init__(self, model: LanguageModel, micro_steps: int, world: World) -> None:
        """Begin with nothing read.

        Args:
            model: On its device, and one that ``check_carried`` lets pass.
            micro_steps: Forward passes of a step.
            world: The processes, each with rows of its own.
        """
        self._model, self._world = model, world
        self._states: list[dict[str, Tensor] | None] = [None] * micro_steps

    def before(self, micro_step: int, rows: int) -> dict[str, Tensor]:
        """Return what a micro-step's rows have read so far."""
        state = self._states[micro_step]
        return by_name(self._model.new_state(rows)) if state is None else state

    def begin(self, tensors: Mapping[str, Tensor], continues_b: Tensor) -> ModelState:
        """Return a micro-step's first state: what rows have read, nothing where they begin anew.

        Args:
            tensors: As ``before`` returned them, by the same names; others are passed over.
            continues_b: Whether a row goes on.
        """
        rows = continues_b.shape[0]
        fresh = self._model.new_state(rows)
        read = ModelState(
            [
                layer.replace(**{name: tensors[f"{i}.{name}"] for name in layer})
                for i, layer in enumerate(fresh.layers)
            ]
        )
        row_b = torch.arange(rows, device=continues_b.device)
        chosen_b = torch.where(continues_b, row_b, row_b + rows)
        return ModelState.concat([read, fresh]).rows(chosen_b)

    def after(self, micro_step: int, tensors: dict[str, Tensor]) -> None:
        """Keep what a micro-step's rows have read by now, without a history of gradients."""
        self._states[micro_step] = tensors

    def forget(self) -> None:
        """Begin all rows anew, as after a step that was not finite."""
        self._states = [None] * len(self._states)

    def gathered(self) -> dict[str, Tensor]:
        """Return the states of all processes' rows, to be saved; every process has to call it.

        Returns:
            ``<micro-step>.<layer>.<name>`` → (processes, rows, …) on the CPU.
        """
        return {
            f"{i}.{name}": _gather(tensor, self._world).cpu()
            for i, state in enumerate(self._states)
            if state is not None
            for name, tensor in state.items()
        }

    def load(self, folder: Path, rows: int) -> bool:
        """Take up the states that a checkpoint holds.

        Args:
            folder: The checkpoint's.
            rows: Rows of a micro-step.

        Returns:
            Whether it holds them for this number of processes, micro-steps and rows; if not, all
            rows begin anew.
        """
        file = folder / CARRIED
        tensors = load_file(file) if file.is_file() else {}
        states: list[dict[str, Tensor] | None] = []
        for i in range(len(self._states)):
            mine = {}
            for name, kind in by_name(self._model.new_state(rows)).items():
                saved = tensors.get(f"{i}.{name}")
                if saved is None or saved.shape != (self._world.size, *kind.shape):
                    return False
                mine[name] = saved[self._world.rank].to(kind)
            states.append(mine)
        self._states = states
        return True


def by_name(state: ModelState) -> dict[str, Tensor]:
    """Return a state's tensors by ``<layer>.<name>``, without their history of gradients."""
    return {
        f"{i}.{name}": layer[name].detach()
        for i, layer in enumerate(state.layers)
        for name in layer
    }


def check_carried(model: LanguageModel, mesh: Mesh) -> None:
    """Refuse to carry states that grow, or of which processes would have parts.

    Args:
        model: Whole, with storage.
        mesh: The processes.

    Raises:
        ConfigError: The model's state grows with every token, or rows are not each one process's.
    """
    degrees = mesh.degrees
    if degrees.tensor * degrees.context > 1:
        raise ConfigError(
            "training.carry_state",
            True,
            "needs a whole state on one process, which parallel.tensor and parallel.context "
            "divide; use data_shard or data_replicate alone, or false.",
        )
    if model.state_grows():
        raise ConfigError(
            "training.carry_state",
            True,
            "the model's attention keeps every token, so its state would grow without end; "
            "give it a window (model.mixers.A.window) or use false.",
        )


def save_carried(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what ``CarriedStates.gathered`` returned into a checkpoint."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / CARRIED)


def _gather(tensor: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)
