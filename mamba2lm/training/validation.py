"""What is looked at along a run: the held-out loss, further figures, a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mamba2lm.data.batches import ValidationSamples, validation_batches
from mamba2lm.distributed import Mesh, World
from mamba2lm.models import LanguageModel
from mamba2lm.training.objective import Objective
from mamba2lm.training.parallelize import ParallelModel


class Validation:
    """Look at a model between steps; every process has to call what is here."""

    def __init__(
        self,
        objective: Objective,
        parallel: ParallelModel,
        mesh: Mesh,
        world: World,
        held_out: ValidationSamples | None,
        *,
        batch_size: int,
        max_batches: int | None,
        evaluate_more: Callable[[LanguageModel], dict[str, float]] | None = None,
        write_sample: Callable[[LanguageModel], str] | None = None,
    ) -> None:
        """Get ready.

        Args:
            objective: Measures the loss.
            parallel: The model.
            mesh: How the processes divide the work.
            world: The processes.
            held_out: What to measure it on; None where nothing is held out.
            batch_size: Samples a process takes at a time.
            max_batches: Take only so many, spread evenly over all; None takes all.
            evaluate_more: Gives further figures of the model, by name.
            write_sample: Writes text with the model.
        """
        self._objective, self._parallel, self._mesh, self._world = objective, parallel, mesh, world
        self._held_out, self._batch_size, self._max_batches = held_out, batch_size, max_batches
        self._evaluate_more, self._write_sample = evaluate_more, write_sample

    def held_out(self, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Measure the loss on the held-out samples.

        Args:
            alive: Called at every batch.

        Returns:
            val_loss in nats per token, val_perplexity, and for text val_bits_per_byte: the loss of
            all tokens over the bytes of their text.
        """
        held_out, model = self._held_out, self._parallel.model
        assert held_out is not None
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        count = 0
        # FSDP's buffers outlive the pass, which inference tensors may not.
        with torch.inference_mode() if self._parallel.layout is None else torch.no_grad():
            for batch in validation_batches(
                held_out,
                batch_size=self._batch_size,
                rank=self._mesh.data_rank,
                world_size=self._mesh.data_size,
                max_batches=self._max_batches,
            ):
                alive()
                loss_sum, labels = self._objective.loss_sum(batch)
                total += loss_sum
                count += labels
        model.train()
        loss_sum, labels = self._world.sum_over_tokens(total, count).tolist()
        loss = loss_sum / max(labels, 1.0)
        figures = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        if held_out.bytes:
            nats_per_byte = loss * held_out.tokens / held_out.bytes
            figures["val_bits_per_byte"] = nats_per_byte / math.log(2)
        return figures

    def more(self) -> dict[str, float]:
        """Return the further figures of the model, on whoever takes part."""
        model = self._parallel.model
        if self._evaluate_more is None or not self._takes_part:
            return {}
        context, model.context = model.context, None  # all read the same, and whole sequences
        model.eval()
        try:
            return self._evaluate_more(model)
        finally:
            model.train()
            model.context = context

    def sample(self) -> str | None:
        """Return text that the model writes, on whoever takes part; all draw the same tokens."""
        if self._write_sample is None or not self._takes_part:
            return None
        self._parallel.model.eval()
        text = self._write_sample(self._parallel.model)
        self._parallel.model.train()
        return text

    @property
    def _takes_part(self) -> bool:
        """Who has only a part of the model takes part; else one process is enough."""
        return self._world.is_main or self._parallel.layout is not None
