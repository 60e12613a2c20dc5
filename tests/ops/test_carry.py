"""Outputs completed by the state that enters later are those computed with it from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import add_carried_outputs, kernels, ssd

from .kernel_runs import (
    DEVICE,
    FLOAT_LIMIT,
    TARGETS,
    compile_kernel,
    poison,
    run_in_interpreter,
    runs_kernels,
)
from .tolerances import relative_error


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_completing_outputs_is_starting_with_the_state(documents: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(3)
    b, length, h, p, n = 2, 21, 4, 5, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, B, C = draw(b, length, h, p), draw(b, length, groups, n), draw(b, length, groups, n)
    dt, A = draw(b, length, h).exp() * 0.1, -draw(h).exp()
    state = draw(b, h, p, n).requires_grad_()
    seq_idx = None
    if documents:
        seq_idx = torch.zeros(b, length, dtype=torch.int64)
        seq_idx[0, 9:] = 1
    whole = ssd(x, dt, A, B, C, initial_states=state, seq_idx=seq_idx, chunk_size=4)
    alone = ssd(x, dt, A, B, C, seq_idx=seq_idx, chunk_size=4)
    log_decay = (dt * A).transpose(1, 2).cumsum(dim=2)
    parts = add_carried_outputs(alone.clone(), log_decay, C, state, seq_idx=seq_idx)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    probe = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad((parts * probe).sum(), state)
    (theirs,) = torch.autograd.grad((whole * probe).sum(), state)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if documents:
        assert parts[0, 9:].allclose(alone[0, 9:])


def test_its_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(4)
    given = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 4, 2, 2), (1, 2, 4), (1, 4, 1, 3), (1, 2, 2, 3))
    ]
    assert torch.autograd.gradcheck(add_carried_outputs, given)


LENGTH = 333  # six chunks of the kernels, the last cut short
ENDS: dict[str, dict[str, Any]] = {
    "faint to the end": {"rate": 0.02, "boundary": None},
    "faded half way": {"rate": 0.6, "boundary": None},
    "a document ends": {"rate": 0.02, "boundary": 100},
}


def run(
    dtype: torch.dtype, impl: Any, *, rate: float, boundary: int | None, p: int = 32, n: int = 16
) -> list[Tensor]:
    """Return the outputs and every gradient."""
    generator = torch.Generator().manual_seed(5)
    b, h, g = 2, 4, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(DEVICE)

    y, C, state = draw(b, LENGTH, h, p), draw(b, LENGTH, g, n), draw(b, h, p, n)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    # One head forgets at once, one hardly.
    rates = -rate * torch.tensor([1.0, 0.3, 30.0, 0.01], device=DEVICE)
    log_decay = (draw(b, h, LENGTH).float().abs() * rates[:, None]).cumsum(dim=2)
    leaves = [y.to(dtype), log_decay.to(wide), C.to(dtype), state.to(wide)]
    for leaf in leaves:
        leaf.requires_grad_()
    seq_idx = None
    if boundary is not None:
        seq_idx = (torch.arange(LENGTH, device=DEVICE) >= boundary).long().expand(b, -1)
    out = add_carried_outputs(leaves[0] * 1.0, *leaves[1:], seq_idx=seq_idx, impl=impl)
    probe = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe)]


@runs_kernels
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT_LIMIT), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_kernels_match_the_reference(
    ends: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    if dtype == torch.bfloat16 and kernels.INTERPRETED:
        pytest.skip("the interpreter multiplies no matrices of bfloat16")
    exact = run(torch.float64, "reference", **ends)
    poison()
    found = run(dtype, "triton", **ends)
    for name, ours, theirs in zip(("y", "dy", "dcum", "dC", "dS"), found, exact, strict=True):
        assert relative_error(ours, theirs) < limit, name


@pytest.mark.skipif(kernels.INTERPRETED or DEVICE == "cuda", reason="the kernels run as they are")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_interpreter(__file__, "match", passed=3)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target: tuple[str, Any, int]) -> None:
    pytest.importorskip("triton")
    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from mamba2lm.ops.ssd import carry_kernels

    types = dict.fromkeys(("cum", "partial", "state", "dcum"), "*fp32") | {"document": "*i32"}
    constants = {"HAS_DOCUMENTS": True, "Q": 64, "P": 64, "N": 128, "PRECISION": "ieee"}
    for name in ("add_kernel", "state_gradient_kernel", "inputs_gradient_kernel"):
        kernel = getattr(carry_kernels, name)
        compile_kernel(kernel, constants, types, target, num_warps=4)
