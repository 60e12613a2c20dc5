"""Mixers as one autograd node each, against the same mixers made of separate operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.layers.mamba1 import Mamba1, Mamba1Config
from mamba2lm.layers.mamba2 import Mamba2, Mamba2Config
from mamba2lm.ops import kernels
from mamba2lm.ops.selective_scan import launch as scan_launch
from mamba2lm.ops.ssd.launch import Blocks, Config, override_config
from tests.ops.kernel_runs import DEVICE, poison, run_in_interpreter, runs_kernels
from tests.ops.tolerances import relative_error

pytest.importorskip("triton")

FLOAT_LIMIT = 3e-5
TINY = Config(
    forward_chunk=16,
    chunk=16,
    states=Blocks(p=16, n=16),
    states_backward=Blocks(p=16, n=16, programs=1),
    through=Blocks(n=16, programs=1),
    within=Blocks(programs=1),
)
SMALL: dict[str, dict[str, Any]] = {"mamba2": {"d_state": 16, "headdim": 16}, "mamba1": {}}
_SCAN = scan_launch.Blocks(channels=32, steps=4, alone=1)
TINY_SCAN = scan_launch.Config(chunk=16, scan=_SCAN, ends=_SCAN, gradients=_SCAN)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "mamba2-two-groups-packed": ("mamba2", {"ngroups": 2}, True),
    "mamba2-biases": ("mamba2", {"bias": True, "d_conv": 3, "dt_limit": [0.05, 0.3]}, False),
    "mamba2-conv-without-bias": ("mamba2", {"conv_bias": False, "d_conv": 2}, False),
    "mamba1-packed": ("mamba1", {"d_state": 4}, True),
    "mamba1-biases": ("mamba1", {"d_state": 3, "bias": True, "d_conv": 3, "dt_rank": 5}, False),
    "mamba1-conv-without-bias": ("mamba1", {"conv_bias": False, "d_conv": 2}, False),
}
"""Kind of mixer, fields of its config, and whether documents are packed."""


@pytest.fixture(autouse=True)
def tuned_again() -> Iterator[None]:
    yield
    tiny(False)


def tiny(on: bool = True) -> None:
    """Launch kernels in blocks that fit small inputs, or as usual."""
    override_config(TINY if on else None)
    scan_launch.override_config(TINY_SCAN if on else None)


def build(kind: str, d_model: int, **fields: Any) -> Mamba1 | Mamba2:
    torch.manual_seed(0)
    if kind == "mamba1":
        mixer = Mamba1(Mamba1Config(**fields), d_model)
    else:
        mixer = Mamba2(Mamba2Config(**fields), d_model)
    mixer.init_weights()
    with torch.no_grad():
        mixer.D.normal_()
        if isinstance(mixer, Mamba2):
            mixer.norm.weight.normal_()
    return mixer.to(DEVICE)


def draw(batch: int, length: int, d_model: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an input, documents of several lengths, and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    x_bld, dy_bld = torch.randn(2, batch, length, d_model, generator=generator).to(DEVICE)
    starts_bl = torch.rand(batch, length, generator=generator) < 3 / length
    return x_bld, starts_bl.cumsum(dim=1).to(DEVICE), dy_bld


def results(
    y_bld: Tensor, x_bld: Tensor, mixer: Mamba1 | Mamba2, dy_bld: Tensor
) -> dict[str, Tensor]:
    parameters = dict(mixer.named_parameters())
    found = torch.autograd.grad(y_bld, [x_bld, *parameters.values()], dy_bld.to(y_bld.dtype))
    return {"y": y_bld.detach(), "dx": found[0], **dict(zip(parameters, found[1:], strict=True))}


def separate(mixer: Mamba1 | Mamba2, x_bld: Tensor, seq_idx_bl: Tensor | None) -> Tensor:
    """Run the mixer's operators one by one, whatever ``forward`` would choose."""
    mixer._fuses = lambda _: False  # type: ignore[method-assign]
    try:
        return mixer(x_bld, seq_idx_bl=seq_idx_bl)[0]
    finally:
        del mixer._fuses


def exact(
    mixer: Mamba1 | Mamba2, x_bld: Tensor, seq_idx_bl: Tensor | None, dy: Tensor
) -> dict[str, Tensor]:
    wide = build(mixer.type_name, mixer.d_model, **vars(mixer.config)).double()
    wide.load_state_dict(mixer.state_dict())
    leaf = x_bld.double().requires_grad_()
    return results(separate(wide, leaf, seq_idx_bl), leaf, wide, dy)


@runs_kernels
@pytest.mark.parametrize("case", CASES)
def test_float32_matches_separate_operators(case: str) -> None:
    tiny()
    kind, fields, packed = CASES[case]
    mixer = build(kind, 16, **{**SMALL[kind], **fields})
    mixer.keep_outputs = not packed
    x_bld, document_bl, dy_bld = draw(2, 18, 16)
    seq_idx_bl = document_bl if packed else None
    expected = exact(mixer, x_bld, seq_idx_bl, dy_bld)
    leaf = x_bld.requires_grad_()
    poison()
    found = results(mixer._forward_fused(leaf, seq_idx_bl), leaf, mixer, dy_bld)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) <= FLOAT_LIMIT, name


@runs_kernels
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_frozen_matrices_match_and_get_no_gradient(kind: str) -> None:
    tiny()
    mixer = build(kind, 16, **SMALL[kind], bias=True)
    x_bld, _, dy_bld = draw(1, 17, 16)
    leaf = x_bld.requires_grad_()
    mixer.requires_grad_(False)
    mixer.D.requires_grad_(True)
    y_bld = mixer._forward_fused(leaf, None)
    dx_bld, dD_h = torch.autograd.grad(y_bld, (leaf, mixer.D), dy_bld)
    mixer.requires_grad_(True)
    expected = exact(mixer, x_bld.detach(), None, dy_bld)
    assert relative_error(dx_bld, expected["dx"]) <= FLOAT_LIMIT
    assert relative_error(dD_h, expected["D"]) <= FLOAT_LIMIT


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_kernels_in_the_interpreter() -> None:
    """Run the tests above on a CPU, where Triton's interpreter stands in for the GPU."""
    run_in_interpreter(__file__, "match", passed=8)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [63, 1000])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_autocast_loses_no_more_than_separate_operators(
    kind: str, length: int, packed: bool
) -> None:
    mixer = build(kind, 768)
    x_bld, document_bl, dy_bld = draw(2, length, 768)
    seq_idx_bl = document_bl if packed else None
    expected = exact(mixer, x_bld, seq_idx_bl, dy_bld)
    found = {}
    for name in ("separate", "fused"):
        leaf = x_bld.detach().requires_grad_()
        poison()
        with torch.autocast("cuda", torch.bfloat16):
            if name == "fused":
                y_bld, _ = mixer(leaf, seq_idx_bl=seq_idx_bl)
                assert "_FusedMamba" in type(y_bld.grad_fn).__name__
            else:
                y_bld = separate(mixer, leaf, seq_idx_bl)
        found[name] = results(y_bld, leaf, mixer, dy_bld)
    for name, value in expected.items():
        allowed = relative_error(found["separate"][name], value)
        assert found["fused"][name].dtype == found["separate"][name].dtype, name
        assert relative_error(found["fused"][name], value) <= 1.05 * allowed + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_compiled_mixer_takes_separate_operators(kind: str) -> None:
    mixer = build(kind, 128)
    x_bld, _, dy_bld = draw(1, 100, 128)
    leaf = x_bld.requires_grad_()
    compiled = torch.compile(mixer, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        y_bld, expected = compiled(leaf)[0], mixer(leaf)[0]
    assert relative_error(y_bld, expected) < 1e-2
    found, wanted = (torch.autograd.grad(y, leaf, dy_bld.to(y.dtype))[0] for y in (y_bld, expected))
    assert relative_error(found, wanted) < 2e-2
