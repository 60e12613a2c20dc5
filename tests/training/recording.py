"""A stand-in for a GPU that records: what a graph does to tensors, on the CPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba2lm.training import trainer
from mamba2lm.training.graph import NoWaiting, StepGraphs, Tensors


def local(tensor: Tensor) -> Tensor:
    """Return the plain tensor that a process has of a DTensor."""
    return getattr(tensor, "_local_tensor", tensor)


class StandIn:
    """Runs at a replay what was recorded, with the tensors that it then read and wrote."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, waits: bool = True) -> None:
        """Record passes that compute the gradients of these parameters.

        Args:
            parameters: They.
            waits: Let pass what a GPU's recording would not: operators' code for CPUs asks for
                values, which that for GPUs does not.
        """
        self.parameters = list(parameters)
        self.rehearsal: Callable[[], contextlib.AbstractContextManager[Any]] = (
            contextlib.nullcontext if waits else lambda: NoWaiting(torch.device("cpu"))
        )
        self.recorded = self.replayed = self.forgotten = 0

    def record(self, work: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        before = [p.grad for p in self.parameters]
        values = [None if g is None else local(g).clone() for g in before]
        random = torch.get_rng_state()
        outputs = work()
        torch.set_rng_state(random)
        written = [p.grad for p in self.parameters]
        # As nothing has run, what is new has no values, and what was there has its old ones.
        for tensor in outputs.values():
            local(tensor).fill_(math.nan)
        for gradient, value in zip(written, values, strict=True):
            if gradient is not None:
                local(gradient).fill_(math.nan) if value is None else local(gradient).copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            now = [p.grad for p in self.parameters]
            for p, gradient in zip(self.parameters, before, strict=True):
                p.grad = gradient
            found = work()
            for name, tensor in outputs.items():
                tensor.copy_(found[name])
            for p, gradient, current in zip(self.parameters, written, now, strict=True):
                if gradient is not None and gradient is not p.grad:
                    assert p.grad is not None
                    local(gradient).copy_(local(p.grad))
                p.grad = current

        return replay, outputs

    def forget(self) -> None:
        self.forgotten += 1


def stand_ins(
    patch: pytest.MonkeyPatch, *, strict: bool = True, waits: bool = True
) -> list[StandIn]:
    """Have trainers record on stand-ins; return those, one for each trainer to come."""
    made: list[StandIn] = []

    def step_graphs(
        config: Any, mesh: Any, device: torch.device, parameters: Iterable[nn.Parameter]
    ) -> StepGraphs | None:
        parameters = list(parameters)
        made.append(StandIn(parameters, waits=waits))
        return StepGraphs(parameters, device, made[-1], strict=strict)

    patch.setattr(trainer, "step_graphs", step_graphs)
    return made
