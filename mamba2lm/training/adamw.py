"""AdamW whose step is one pass over memory: clipping, update and copies in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
        self._prepared: list[_Part] | None = None
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
        known: dict[int, int] = {}
        """Numbers of steps by the tensor that holds them, which parameters share."""
        for group in self.param_groups:
            by_step: dict[int, list[_One]] = {}
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = _UNTAKEN
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                count = state["step"]
                number = known.get(id(count))
                if number is None:
                    number = known[id(count)] = int(count) + 1
                one = _One(parameter, gradient, state, kept_copy(parameter))
                by_step.setdefault(number, []).append(one)
            for number, ones in by_step.items():
                update = Update(
                    [one.parameter for one in ones],
                    [one.gradient for one in ones],
                    [one.state["exp_avg"] for one in ones],
                    [one.state["exp_avg_sq"] for one in ones],
                    [None if one.copy is None else one.copy.tensor for one in ones],
                    factor,
                )
                self._prepared.append(_Part(group, number, ones, update))

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
            changed = [one.parameter for one in part.ones]
            for name in ("exp_avg", "exp_avg_sq"):
                changed += [one.state[name] for one in part.ones]
            copies = [one.copy.tensor for one in part.ones if one.copy is not None]
            changed += [copy for copy in copies if copy is not None]
            torch.autograd.graph.increment_version(changed)
            count = torch.tensor(float(part.number))
            for one in part.ones:
                one.state["step"] = count
                if one.copy is not None:
                    one.copy.mark(one.parameter)


_UNTAKEN = torch.tensor(0.0)
"""Number of steps of a parameter that has taken none; read only, as every such tensor."""


class _One(NamedTuple):
    """A parameter to update."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    copy: Copy | None


class _Part(NamedTuple):
    """An update of parameters of one group that have been updated equally often."""

    group: dict[str, Any]
    number: int
    ones: list[_One]
    update: Update
