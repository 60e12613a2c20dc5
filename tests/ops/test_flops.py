"""Counted FLOPs are those that PyTorch measures on the operator."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mamba2lm.ops import ssd
from mamba2lm.ops.flops import selective_scan_flops, ssd_flops


@pytest.mark.parametrize(("length", "chunk_size"), [(128, 32), (100, 32), (20, 64)])
@pytest.mark.parametrize("g", [1, 2])
def test_ssd_count_equals_measured(length: int, chunk_size: int, g: int) -> None:
    b, h, p, n = 3, 4, 8, 16
    torch.manual_seed(0)
    x, dt = torch.randn(b, length, h, p), torch.rand(b, length, h)
    B, C = torch.randn(b, length, g, n), torch.randn(b, length, g, n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ssd(x, dt, -torch.rand(h), B, C, chunk_size=chunk_size)
    counted = ssd_flops(
        batch=b, length=length, n_heads=h, head_dim=p, n_groups=g, d_state=n, chunk_size=chunk_size
    )
    assert counter.get_total_flops() == counted


def test_selective_scan_counts_three_multiply_adds() -> None:
    assert selective_scan_flops(batch=2, length=5, d_inner=7, d_state=3) == 6 * 2 * 5 * 7 * 3
