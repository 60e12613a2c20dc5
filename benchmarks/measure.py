"""What the benchmarks share: models by name, errors, times, and the machine they were taken on."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from eval.report import git_commit
from mamba2lm.cli import CONFIGS
from mamba2lm.models import ModelConfig
from mamba2lm.schema import closest, from_mapping

COPY_BANDWIDTH = 3.0e12
"""Bytes a second that a copy moves on the H100 of these figures (read plus written)."""

HALF_LIMIT = 1.2
"""A kernel may lose this much more than PyTorch in the same dtype."""

FLOAT_LIMIT = 3e-5
"""Relative error allowed in float32."""


def preset(name: str, changes: Sequence[str] = ()) -> ModelConfig:
    """Return a preset of ``configs/model``, with changes as Hydra takes them.

    Raises:
        SystemExit: There is none of that name; the message says which there are.
    """
    folder = CONFIGS / "model"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        sys.exit(f"error: {name!r} is no preset.{closest(name, known)} Known: {', '.join(known)}.")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return from_mapping(ModelConfig, compose(name, overrides=list(changes)), "model")


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """End the program with a line where there is no GPU."""
    if not torch.cuda.is_available():
        parser.error("this is timed on a GPU, and PyTorch finds none here")


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    document: Tensor | None,
    gradients: tuple[Tensor, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return outputs and all gradients, the inputs cast to a dtype first if one is given."""
    leaves = {
        name: (value if dtype is None else value.to(dtype)).detach().requires_grad_()
        for name, value in inputs.items()
    }
    y, state = function(leaves, document)
    dy, dstate = (g.to(o.dtype) for g, o in zip(gradients, (y, state), strict=True))
    found = torch.autograd.grad([y, state], list(leaves.values()), [dy, dstate])
    named = {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error, in norm, of every result."""
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp(min=1e-300)).item()
        for name, value in exact.items()
    }


def poison() -> None:
    """Fill free memory with NaN, so that what a kernel forgets to write shows."""
    blocks = [torch.full((1 << 27,), float("nan"), device="cuda") for _ in range(4)]
    small = [torch.full((1 << k,), float("nan"), device="cuda") for k in range(8, 22)]
    del blocks, small


def wall(
    function: Callable[[], object], *, seconds: float = 0.3, threads: bool = True
) -> dict[str, float]:
    """Time calls one after another, as a program makes them, in milliseconds.

    PyTorch runs a backward pass on a thread of its own; waking that thread and the first one again
    costs more than a small operator. With ``threads=False`` it runs on the calling thread, as in a
    program that calls ``torch.autograd.set_multithreading_enabled(False)``.
    """
    with torch.autograd.set_multithreading_enabled(threads):
        return _wall(function, seconds=seconds)


def _wall(function: Callable[[], object], *, seconds: float) -> dict[str, float]:
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repeats = max(5, min(200, int(seconds / 5 / (time.perf_counter() - begin))))
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) / repeats * 1e3)
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def kernel_times(function: Callable[[], object], *, repeats: int = 10) -> dict[str, float]:
    """Return milliseconds per call spent in each GPU kernel."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / repeats / 1e3
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def passes(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], dy: Tensor
) -> dict[str, Callable[[], object]]:
    """Return the forward pass alone and both passes as callables without arguments."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}

    def forward() -> Tensor:
        with torch.no_grad():
            return function(inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(leaves), list(leaves.values()), dy)

    return {"forward": forward, "both": both}


def environment() -> dict[str, str | None]:
    """Describe the machine and the program."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": git_commit(),
    }
