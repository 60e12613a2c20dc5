"""What is minimised: the mean loss over the tokens of all processes, and its gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba2lm.distributed import Mesh, World
from mamba2lm.training.carry import CarriedStates, by_name
from mamba2lm.training.graph import StepGraphs, Tensors
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
        graphs: StepGraphs | None = None,
    ) -> None:
        """Measure a model's loss.

        Args:
            parallel: The model.
            mesh: How the processes divide the work.
            world: The processes.
            dtype: Of the matrix products.
            carried: The states that each micro-step begins from; None: all begin from nothing.
            graphs: Replays micro-steps; None: they run launch by launch.
        """
        self._parallel, self._mesh, self._world = parallel, mesh, world
        self._device, self._dtype = world.device, dtype
        self._carried, self._graphs = carried, graphs

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
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        # Processes average their gradients: times their number is the sum.
        share = world.size // world.copies / max(count, 1.0)
        for i, batch in enumerate(micro_batches):
            with self._parallel.micro_batch(last=i == len(micro_batches) - 1):
                total += self._micro_step(i, batch, share)
        self._parallel.finish_gradients()
        norm = self._parallel.gradient_norm()
        clip(norm)
        [loss_sum], after = self._sum_and_wait(total / world.copies)
        return Gradient(loss_sum / max(count, 1.0), float(norm), flags, before + after)

    def loss_sum(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the summed loss, and how many labels, of this process's part of a batch."""
        batch = self._stretch(batch)
        moved = self._moved(batch)
        with autocast(self._device, self._dtype):
            output = self._parallel.model(
                moved["input_ids"],
                moved["labels"],
                seq_idx=moved.get("seq_idx"),
                loss_reduction="sum",
            )
        return output.loss, count_labels(batch)

    def _stretch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's stretch of sequences that several share."""
        context = self._mesh.context
        return batch if context is None else {k: context.stretch(v) for k, v in batch.items()}

    def _micro_step(self, number: int, batch: dict[str, Tensor], share: float) -> Tensor:
        """Add a batch's gradient, times ``share``, to the parameters'; return its summed loss."""
        share_tensor = torch.full((), share, dtype=torch.float32, device=self._device)
        inputs = {**batch, "share": share_tensor}
        carried = self._carried
        if carried is not None:
            inputs |= carried.before(number, len(batch["input_ids"]))
        if self._graphs is not None:
            outputs = self._graphs.run(self._learn, inputs, first=number == 0)
        else:
            outputs = self._learn(self._moved(inputs))
        loss = outputs.pop("loss")
        if carried is not None:
            carried.after(number, outputs)
        return loss

    def _learn(self, inputs: Tensors) -> Tensors:
        """Run forward and backward pass; the host decides nothing by what is in the tensors.

        Args:
            inputs: A batch, ``share`` and perhaps carried states, on the device.

        Returns:
            The summed ``loss``, and the states that carried ones have become.
        """
        state = None
        if self._carried is not None:
            state = self._carried.begin(inputs, inputs["continues"])
        with autocast(self._device, self._dtype):
            output = self._parallel.call(
                inputs["input_ids"],
                inputs["labels"],
                seq_idx=inputs.get("seq_idx"),
                state=state,
                loss_reduction="sum",
            )
        # Another thread would launch the same kernels after a hand-over in each direction.
        with torch.autograd.set_multithreading_enabled(False):
            output.loss.backward(inputs["share"])
        after = {} if output.state is None else by_name(output.state)
        return {"loss": output.loss.detach(), **after}

    def _moved(self, batch: Mapping[str, Tensor]) -> Tensors:
        return {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}

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
