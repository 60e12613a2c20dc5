"""Products that sum gradients over tokens."""

from __future__ import annotations

import pytest
import torch

from mamba2lm.ops.products import add_matrix_gradient, bias_gradient, matrix_gradient
from tests.ops.kernel_runs import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_products_over_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dy_tm, x_tk = torch.randn(96, 8).to(DEVICE, dtype), torch.randn(96, 16).to(DEVICE, dtype)
    exact = dy_tm.double().t() @ x_tk.double()
    # On a GPU the product leaves in float32; a CPU rounds it to the dtype of its factors.
    limit = 1e-5 if dtype == torch.float32 or DEVICE == "cuda" else 4e-3
    for wanted in (torch.float32, dtype):
        found = matrix_gradient(dy_tm, x_tk, wanted)
        assert found.dtype == wanted
        error = (found - exact).norm() / exact.norm()
        assert error <= (limit if wanted == torch.float32 else max(limit, 4e-3))
    total = torch.ones(8, 16, device=DEVICE)
    add_matrix_gradient(total, dy_tm, x_tk)
    assert (total - exact - 1).norm() <= limit * exact.norm()
    found = bias_gradient(dy_tm, torch.float32)
    torch.testing.assert_close(found, dy_tm.double().sum(dim=0).float(), rtol=1e-5, atol=1e-4)
