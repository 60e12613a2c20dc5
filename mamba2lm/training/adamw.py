"""AdamW whose step is one pass over memory: clipping, update and copies in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.adamw.launch import Update
from mamba2lm.ops.adamw.reference import Settings
from mamba2lm.ops.copies import Copy, follow, kept_copy


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW by one kernel a group; the states have the same names and meaning.

    Copies of matrices in bfloat16 that products have made are updated with them, so that no step
    casts a weight; see ``mamba2lm.ops.copies``.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Take parameters to update.

        Args:
            params: float32 tensors, or groups of them as torch's optimizers take; see
                ``ops.adamw.launch.unsupported``.
            lr: Learning rate.
            betas: Shares of the running means of the gradient and of its square that a step keeps.
            eps: Added to the root of the latter.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._prepared: list[_Prepared] | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim >= 2:
                    follow(parameter)

    @torch.no_grad()
    def prepare(self, factor: Tensor | None = None) -> None:
        """Do the host's part of the next step, for parameters that have a gradient.

        Args:
            factor: What to multiply the gradients by, a float32 scalar; None: 1. They themselves
                stay as they are.
        """
        self._prepared = []
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                by_step.setdefault(int(state["step"]) + 1, []).append(parameter)
            for number, parameters in by_step.items():
                self._prepared.append(self._prepare(group, number, parameters, factor))

    def _prepare(
        self, group: dict[str, Any], number: int, parameters: list[Tensor], factor: Tensor | None
    ) -> _Prepared:
        states = [self.state[parameter] for parameter in parameters]
        copies = [kept_copy(parameter) for parameter in parameters]
        update = Update(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [None if copy is None else copy.tensor for copy in copies],
            factor,
        )
        return _Prepared(group, number, parameters, copies, update)

    def forget(self) -> None:
        """Drop what was prepared: the step is not taken."""
        self._prepared = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that had a gradient when the step was prepared, or have one now."""
        assert closure is None, "losses are computed once a step"
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        for part in prepared:
            group = part.group
            part.update.launch(
                Settings(
                    rate=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=part.number,
                )
            )
        for part in prepared:  # while the device works
            states = [self.state[parameter] for parameter in part.parameters]
            changed = [*part.parameters, *(s["exp_avg"] for s in states)]
            changed += [s["exp_avg_sq"] for s in states]
            changed += [c.tensor for c in part.copies if c is not None and c.tensor is not None]
            torch.autograd.graph.increment_version(changed)
            for parameter, state, copy in zip(part.parameters, states, part.copies, strict=True):
                state["step"].fill_(float(part.number))
                if copy is not None:
                    copy.mark(parameter)


class _Prepared:
    """An update of parameters of one group that have been updated equally often."""

    def __init__(
        self,
        group: dict[str, Any],
        number: int,
        parameters: list[Tensor],
        copies: list[Copy | None],
        update: Update,
    ) -> None:
        self.group, self.number, self.parameters = group, number, parameters
        self.copies, self.update = copies, update
