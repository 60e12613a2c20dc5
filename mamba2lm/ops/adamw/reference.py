"""One step of AdamW in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What the tensors of one update share."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Number of this update, from 1."""


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    settings: Settings,
    factor: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a parameter and its two moments after an update.

    Args:
        parameter: Any shape.
        gradient: Of the loss, same shape.
        first: Running mean of the gradient.
        second: Running mean of its square.
        settings: The update's.
        factor: What the gradient is multiplied by first: clipping's.

    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, with the rate as schedule
    multiplier of the decay too, as torch.optim.AdamW has it.
    """
    s = settings
    gradient = gradient * factor
    first = s.beta1 * first + (1 - s.beta1) * gradient
    second = s.beta2 * second + (1 - s.beta2) * gradient.square()
    mean = first / (1 - s.beta1**s.step)
    deviation = (second / (1 - s.beta2**s.step)).sqrt()
    parameter = parameter * (1 - s.rate * s.weight_decay)
    return parameter - s.rate * mean / (deviation + s.eps), first, second
