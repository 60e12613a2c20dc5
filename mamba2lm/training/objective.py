"""What is minimised: the mean loss over the tokens of all processes, and its gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba2lm.distributed import Mesh, World
from mamba2lm.training.carry import CarriedStates
from mamba2lm.training.parallelize import ParallelModel
from mamba2lm.training.precision import autocast


@dataclass
class Gradient:
    """What is known of a gradient, the same on every process but for ``waited``."""

    loss: float
    """Mean over all labels of the step, nats per token."""
    norm: float
    """Before clipping."""
    flags: list[float]
    """What the processes had to say to each other, added up."""
    waited: float
    """Seconds that this process waited for others at the step's beginning and end."""


class Objective:
    """The loss of a model on what its processes read."""

    def __init__(
        self,
        parallel: ParallelModel,
        mesh: Mesh,
        world: World,
        *,
        dtype: torch.dtype,
        carried: CarriedStates | None = None,
    ) -> None:
        """Measure a model's loss.

        Args:
            parallel: The model.
            mesh: How the processes divide the work.
            world: The processes.
            dtype: Of the matrix products.
            carried: The states that each micro-step begins from; None: all begin from nothing.
        """
        self._parallel, self._mesh, self._world = parallel, mesh, world
        self._device, self._dtype = world.device, dtype
        self._carried = carried

    def backward(
        self,
        micro_batches: list[dict[str, Tensor]],
        *,
        clip: Callable[[Tensor], None],
        flags: list[float],
    ) -> Gradient:
        """Accumulate the gradient of the mean loss over all labels of a step, and clip it.

        Args:
            micro_batches: This process's share of the step, as ``training_batches`` gives it.
            clip: Clips gradients of the norm that it is given, before the host waits for it.
            flags: Numbers to add over the processes beside the labels, say 1 for "please stop".

        Returns:
            Loss, norm and sums.
        """
        world = self._world
        micro_batches = [self._stretch(batch) for batch in micro_batches]
        labels = sum(count_labels(batch) for batch in micro_batches)
        (count, *flags), before = self._sum_and_wait(labels / world.copies, *flags)
        averaged = world.size // world.copies
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        for i, batch in enumerate(micro_batches):
            with self._parallel.micro_batch(last=i == len(micro_batches) - 1):
                loss = self._loss_sum(self._parallel.call, batch, carry=i)
                # Processes average their gradients: times their number is the sum. Another thread
                # would launch the same kernels after a hand-over in each direction.
                with torch.autograd.set_multithreading_enabled(False):
                    (loss * (averaged / max(count, 1.0))).backward()
                total += loss.detach()
        self._parallel.finish_gradients()
        norm = self._parallel.gradient_norm()
        clip(norm)
        [loss_sum], after = self._sum_and_wait(total / world.copies)
        return Gradient(loss_sum / max(count, 1.0), float(norm), flags, before + after)

    def loss_sum(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the summed loss, and how many labels, of this process's part of a batch."""
        batch = self._stretch(batch)
        return self._loss_sum(self._parallel.model, batch), count_labels(batch)

    def _stretch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's stretch of sequences that several share."""
        context = self._mesh.context
        return batch if context is None else {k: context.stretch(v) for k, v in batch.items()}

    def _loss_sum(
        self, model: nn.Module, batch: dict[str, Tensor], carry: int | None = None
    ) -> Tensor:
        """Return the loss of a batch, from the state carried to this micro-step, if any is."""
        moved = {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}
        carried = None if carry is None else self._carried
        state = None
        if carried is not None and carry is not None:
            state = carried.before(carry, moved["continues"])
        with autocast(self._device, self._dtype):
            output = model(
                moved["input_ids"],
                moved["labels"],
                seq_idx=moved.get("seq_idx"),
                state=state,
                loss_reduction="sum",
            )
        if carried is not None and carry is not None:
            carried.after(carry, output.state)
        return output.loss

    def _sum_and_wait(self, *values: float | Tensor) -> tuple[list[float], float]:
        """Add numbers over processes; return the seconds that the others were later, too."""
        if self._world.size > 1 and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        sums = self._world.sum(*values).tolist()
        return sums, time.perf_counter() - begin


def count_labels(batch: dict[str, Tensor]) -> int:
    """Return the number of positions that have something to predict."""
    return int((batch["labels"] != -100).sum())
