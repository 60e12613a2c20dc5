"""RMSNorm and gated RMSNorm as modules; the mathematics is in ``mamba2lm.ops``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba2lm.distributed import TensorGroup
from mamba2lm.ops import gated_rms_norm, gated_rms_norm_divided, rms_norm, rms_norm_residual
from mamba2lm.ops.gated_rms_norm.divided import Runs


def compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype that autocast gives matrix products, or ``otherwise`` where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


class RMSNorm(nn.Module):
    """Scale every vector to unit root mean square, then by a learned weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis.

        Args:
            x: (..., width), any float dtype; statistics are taken in float32 (float64 for float64).

        Returns:
            (..., width) in the dtype that a layer computes in, autocast's or else the weight's: a
            float32 residual stream enters bf16 layers.
        """
        return rms_norm(x, self.weight, eps=self.eps, out_dtype=self._out_dtype(x))

    def of_sum(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add to the residual stream and normalise the sum, in one pass.

        Args:
            x: The stream, (..., width).
            added: What a layer adds to it, same shape, or None.

        Returns:
            The normalised sum, as ``forward`` gives it, and the sum in the dtype of ``x``.
        """
        if added is None:
            return self(x), x
        return rms_norm_residual(added, x, self.weight, eps=self.eps, out_dtype=self._out_dtype(x))

    def _out_dtype(self, x: Tensor) -> torch.dtype:
        return compute_dtype(x.device, self.weight.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm(y · SiLU(z)) in groups of channels: gate before norm."""

    def __init__(self, width: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.group_size, self.eps = group_size, eps
        self.shared: Runs | None = None
        """Set where groups reach over processes."""
        self.weight = nn.Parameter(torch.empty(width))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate ``y`` (..., width) by ``z`` (same shape) and normalise; returns y's dtype."""
        if self.shared is not None:
            return gated_rms_norm_divided(y, z, self.weight, self.shared, eps=self.eps)
        return gated_rms_norm(y, z, self.weight, eps=self.eps, group_size=self.group_size)

    @property
    def run(self) -> int:
        """Channels in a row that this process normalises together."""
        return self.group_size if self.shared is None else self.shared.width(self.weight)

    def share_groups(self, tensor: TensorGroup, mine: list[int], groups: int) -> None:
        """Normalise over groups that reach over several processes.

        Args:
            tensor: The processes that share the channels.
            mine: The group of each equal run of this process's channels.
            groups: Number of groups.
        """
        self.shared = Runs(tensor.group, self.group_size, tuple(mine), groups)
