"""Initialisation that both Mambas share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_dt_bias(like: Tensor, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """Sample biases whose softplus is log-uniform in [dt_min, dt_max], floored at ``floor``."""
    log_dt = torch.rand_like(like) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
    dt = log_dt.exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
