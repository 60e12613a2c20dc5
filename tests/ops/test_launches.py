"""Launches repeated from what the first under a key were, with stand-ins for kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.ops import kernels
from mamba2lm.ops.kernels import Launches
from mamba2lm.ops.ssd import launch as ssd
from mamba2lm.ops.ssd.config import Blocks, Config, override_config

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled there")

Started = list[tuple[Any, ...]]


class StandIn:
    """A jitted kernel and its binary: notes its grid and arguments instead of running."""

    def __init__(self, kernel: Any, started: Started) -> None:
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names
        self.started = started
        self.function = self.packed_metadata = None

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_start(
            *arguments: Any, num_warps: int, num_stages: int, **named: Any
        ) -> Any:
            self.note(grid, (*arguments, *named.values()))
            return self

        return compile_and_start

    def run(self, *arguments: Any) -> None:
        self.note(arguments[:3], arguments[9:])

    def note(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        self.started.append((self.__name__, *grid, *plain))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """Let the SSD's launchers start stand-ins; return what they started."""
    noted: Started = []
    real = ssd._kernels
    found: dict[str, Any] = {}

    def stand_ins(module: str) -> Any:
        names = [name for name in dir(real(module)) if name.endswith("_kernel")]
        return SimpleNamespace(
            **{n: found.setdefault(n, StandIn(getattr(real(module), n), noted)) for n in names}
        )

    monkeypatch.setattr(ssd, "_kernels", stand_ins)
    monkeypatch.setattr(kernels, "_stream", lambda: 0)
    monkeypatch.setattr(Launches, "_known", {})
    yield noted
    override_config(None)


def inputs(seed: int, *, gate: bool, packed: bool, initial: bool, alike: bool) -> tuple[Any, ...]:
    """Draw the arguments of ``forward``; ``alike`` gives one tensor in two places, twice."""
    torch.manual_seed(seed)
    b, length, h, p, n = 2, 1100, 4, 32, 32
    fused = torch.randn(b, length, h * p + 2 * n, dtype=torch.bfloat16)
    x, B, C = fused.split([h * p, n, n], dim=-1)
    B, C = B.unsqueeze(2), C.unsqueeze(2)
    A, D = -torch.rand(h), torch.randn(h)
    return (
        x.view(b, length, h, p), torch.randn(b, length, h), A, B, B if alike else C,
        A if alike else D, torch.randn(b, length, h, p, dtype=torch.bfloat16) if gate else None,
        torch.randn(h), torch.randn(b, h, p, n) if initial else None,
        torch.zeros(b, length, dtype=torch.int32) if packed else None, True, 0.0, 1.0,
    )  # fmt: skip


CHUNKED = Config(forward_chunk=128, states=Blocks(p=32, n=32), through=Blocks(n=16))
FUSED = dataclasses.replace(CHUNKED, fused=Blocks(p=16), forward_chunk=64)


@pytest.mark.parametrize("config", [CHUNKED, FUSED])
@pytest.mark.parametrize(("gate", "packed", "initial"), [(False,) * 3, (True,) * 3])
def test_a_repeated_pass_starts_what_a_first_one_would(
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    gate: bool,
    packed: bool,
    initial: bool,
) -> None:
    compared: list[str] = []
    run = Launches.run

    def run_and_compare(self: Launches, launch_all: Any, tensors: Any, *rest: Any) -> None:
        again = self.known.launches is not None
        started.clear()
        run(self, launch_all, tensors, *rest)
        found = started.copy()
        if again:
            started.clear()
            launch_all(self, *tensors, *rest)
            compared.extend(each[0] for each in found)
            assert found == started

    monkeypatch.setattr(Launches, "run", run_and_compare)
    override_config(config)
    for seed, alike in enumerate((True, False)):
        drawn = inputs(seed, gate=gate, packed=packed, initial=initial, alike=alike)
        y, final, pre = ssd.forward(*drawn)
        dfinal = torch.randn_like(final) if initial else None
        into = torch.empty(2, 1100, 5, 32, dtype=torch.bfloat16)[:, :, :4] if packed else None
        arguments: list[Any] = [torch.randn_like(y), dfinal, *drawn[:10], pre, *drawn[10:]]
        steps = torch.empty(2, 1100, 9)[..., 2:6] if packed else None
        ssd.backward(*arguments, dx_out=into, ddt_out=steps)
    forward = ["fused_kernel"] if config.fused else ["states_kernel", "scan_kernel"]
    assert compared == [
        "steps_kernel", *forward, *(["gate_backward_kernel"] if gate else []),
        "steps_kernel", "states_kernel", "through_states_kernel", "within_kernel",
        "steps_backward_kernel", "reduce_kernel", "reduce_kernel",
    ]  # fmt: skip


def test_profilers_hear_of_repeated_launches(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    heard: list[Any] = []
    monkeypatch.setattr(
        StandIn, "__getitem__", lambda self, grid: lambda *a, **k: heard.append(grid) or self
    )
    launches = Launches(torch.device("cpu"), "test")
    kernel = StandIn(SimpleNamespace(__name__="k", arg_names=["x_ptr"]), started)

    def launch_all(launch: Launches, x: Tensor) -> None:
        launch(kernel, (3, 1, 1), x, warps=4)

    def hook(metadata: Any) -> None:
        del metadata

    for _ in range(2):
        launches.run(launch_all, (torch.zeros(1),))
    assert (len(heard), len(started)) == (1, 1)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launches.run(launch_all, (torch.zeros(1),))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert (heard, len(started)) == ([(3, 1, 1)] * 2, 1)


def test_a_pointer_must_lie_in_a_tensor_of_the_pass(started: Started) -> None:
    kernel = StandIn(SimpleNamespace(__name__="k", arg_names=["x_ptr"]), started)
    launches = Launches(torch.device("cpu"), "test")
    with pytest.raises(AssertionError, match="to none of the tensors"):
        launches.run(lambda launch, x: launch(kernel, (1, 1, 1), x + 1, warps=4), (torch.ones(4),))
    assert launches.known.launches is None
