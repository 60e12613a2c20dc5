"""Products that sum gradients over tokens."""

from __future__ import annotations

import pytest
import torch

from mamba2lm.ops.copies import follow, kept_copy
from mamba2lm.ops.products import (
    add_matrix_gradient,
    bias_gradient,
    linear,
    matrix_gradient,
)
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("followed", [True, False])
def test_linear_is_that_of_autocast_with_better_gradients(bias: bool, followed: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias=bias).to(DEVICE)
    wide = torch.nn.Linear(48, 40, bias=bias).to(DEVICE).double()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(3, 100, 48).to(DEVICE, torch.bfloat16)
    dy = torch.randn(3, 100, 40).to(DEVICE, torch.bfloat16)
    if followed:
        follow(layer.weight)
    found = []
    for ours in (True, False):
        leaf = x.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = linear(leaf, layer.weight, layer.bias) if ours else layer(leaf)
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        found.append((y.detach(), *gradients))
    leaf = x.double().requires_grad_()
    y = wide(leaf)
    exact = (y, *torch.autograd.grad(y, [leaf, *wide.parameters()], dy.double()))
    assert torch.equal(found[0][0], found[1][0])
    for ours, plain, wanted in zip(*found, exact, strict=True):
        assert ours.dtype == plain.dtype
        error, allowed = (float((v.detach() - wanted.detach()).norm()) for v in (ours, plain))
        assert error <= 1.05 * allowed
    copy = kept_copy(layer.weight)
    assert (copy is not None) == followed
    if copy is not None:
        assert torch.equal(copy.tensor, layer.weight.detach().bfloat16())


def test_linear_gives_only_the_gradients_that_are_wanted() -> None:
    weight = torch.randn(4, 3, device=DEVICE)
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(5, 3))
    leaf = weight.clone().requires_grad_()
    linear(x.detach(), leaf, torch.ones(4, device=DEVICE)).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, x.detach().sum(dim=0).expand(4, 3))
