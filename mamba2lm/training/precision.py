"""Which dtype matrix products run in."""

from __future__ import annotations

import contextlib
from enum import Enum
from typing import Any

import torch

from mamba2lm.host import cpu_has_fast_bf16


class Precision(Enum):
    """Dtype of the matrix products; weights and optimizer stay float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that ``training.precision`` means on a device."""
    if precision is Precision.auto:
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = cpu_has_fast_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products run in ``dtype``."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
