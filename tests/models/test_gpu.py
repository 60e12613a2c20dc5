"""Whole models on a GPU, through the kernels, against the same models on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mamba2lm.models import LanguageModel
from mamba2lm.training.parallelize import compile_blocks
from tests.models.small import small_config, tokens

PATTERNS = ("MM", "SS", "MSAF")


def small_wide(pattern: str) -> LanguageModel:
    """Return a small model whose mixers are of sizes that the kernels take."""
    config = small_config(pattern)
    config.mixers["M"].update(d_state=16, headdim=32)
    config.mixers["S"].update(d_state=16)
    model = LanguageModel(config)
    model.init_weights(0)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_losses_and_gradients_equal_those_of_the_cpu(pattern: str, packed: bool) -> None:
    cpu, gpu = small_wide(pattern), small_wide(pattern).to("cuda")
    ids = tokens(3, 200)
    seq_idx = torch.arange(200).div(70, rounding_mode="floor").expand(3, -1) if packed else None
    expected = cpu(ids[:, :-1], ids[:, 1:], seq_idx=None if seq_idx is None else seq_idx[:, :-1])
    expected.loss.backward()
    on_gpu = None if seq_idx is None else seq_idx[:, :-1].cuda()
    found = gpu(ids[:, :-1].cuda(), ids[:, 1:].cuda(), seq_idx=on_gpu)
    found.loss.backward()
    assert abs(found.loss.item() - expected.loss.item()) <= 1e-5
    others = dict(gpu.named_parameters())
    for name, parameter in cpu.named_parameters():
        gradient, other = parameter.grad, others[name].grad
        assert gradient is not None
        assert other is not None
        assert (other.cpu() - gradient).norm() <= 2e-4 * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_equal_the_forward_pass(pattern: str) -> None:
    model = small_wide(pattern).to("cuda").eval()
    ids = tokens(2, 70).cuda()
    with torch.no_grad():
        full = model(ids).logits
        state = model.new_state(2)
        output = model(ids[:, :50], state=state)
        state = output.state
        for t in range(50, 70):
            logits, state = model.step(ids[:, t], state)
            torch.testing.assert_close(logits, full[:, t], rtol=1e-4, atol=1e-4)


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare gradients in half precision: close together, none missing."""
    error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)])
    size = torch.stack([gradient.norm() for gradient in expected])
    assert error.norm() <= 5e-2 * size.norm()
    assert (error <= 0.5 * size).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["MM", "AF"])
def test_a_training_step_compiles_around_the_kernels(pattern: str) -> None:
    model = small_wide(pattern).to("cuda")
    ids = tokens(2, 129).cuda()
    parameters = list(model.parameters())
    results = []
    for call in (model, torch.compile(model)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = call(ids[:, :-1], ids[:, 1:]).loss
        results.append((loss.item(), torch.autograd.grad(loss, parameters)))
    (eager, expected), (found, gradients) = results
    assert abs(eager - found) <= 1e-2
    assert_alike(gradients, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_run_on_the_kernels(packed: bool) -> None:
    config = small_config("AF")
    model = LanguageModel(config).to("cuda")
    model.init_weights(0)
    ids = tokens(2, 129).cuda()
    seq_idx = torch.arange(128, device="cuda").div(50, rounding_mode="floor").expand(2, -1)
    parameters = list(model.parameters())
    results = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, ids.device)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:], seq_idx=seq_idx if packed else None).loss
        results.append(torch.autograd.grad(loss, parameters))
        activity = torch.profiler.ProfilerActivity.CUDA
        with (
            torch.autocast("cuda", torch.bfloat16),
            torch.profiler.profile(activities=[activity]) as profile,
        ):
            model(ids[:, :-1], ids[:, 1:], seq_idx=seq_idx if packed else None)
        names = {event.key for event in profile.key_averages()}
        assert {"swiglu_kernel", "rotary_kernel", "rms_norm_kernel"} <= names
    assert_alike(results[1], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M", "S"])
def test_a_layer_compiles_whole(pattern: str) -> None:
    block = small_wide(pattern).blocks[0].to("cuda")
    mixer = block.mixer
    x = torch.randn(2, 130, small_config(pattern).d_model, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda hidden: mixer(hidden)[0], fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        eager, found = mixer(x)[0], compiled(x)
    torch.testing.assert_close(found, eager, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(eager)
    expected, gradient = (torch.autograd.grad(y, x, weight)[0] for y in (eager, found))
    assert (gradient - expected).norm() <= 2e-2 * expected.norm()
