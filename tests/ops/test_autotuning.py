"""What a library's autotuners will try, compiled beforehand; no GPU is needed to compile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.autotuning import compiling, tune_briefly
from mamba2lm.ops import kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled there")

SIZES = (16, 32, 64, 128, 256)


class NoGpu:
    """What Triton asks of a GPU to compile for one."""

    launcher_cls = SimpleNamespace
    utils = SimpleNamespace()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def doubled_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2.0 * tl.load(x_ptr + i, mask=i < size), mask=i < size)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGpu())
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    return tmp_path


def autotuned(sizes: Iterable[int]) -> Any:
    """Return the kernel with its configurations, as a library has it."""
    configs = [triton.Config({"BLOCK": size}) for size in sizes]
    return triton.autotune(configs=configs, key=["size"])(triton.jit(doubled_kernel))


def call(kernel: Any) -> None:
    x = torch.zeros(100)
    kernel[lambda meta: (-(-100 // meta["BLOCK"]),)](x, torch.empty_like(x), 100)


def test_shares_compile_every_configuration_once(cache: Path) -> None:
    kernel = autotuned(SIZES)
    for index, compiled in enumerate((2, 4, 5)):
        with compiling(index, 3) as failed:
            call(kernel)
        assert failed == []
        assert len(list(cache.glob("*/doubled_kernel.cubin"))) == compiled
    assert kernel.best_config.kwargs == {"BLOCK": SIZES[0]}


def test_what_does_not_compile_is_passed_over(cache: Path) -> None:
    with compiling(0, 1) as failed:
        call(autotuned((3, 32)))
    assert [line.split(",")[0] for line in failed] == ["doubled_kernel BLOCK: 3"]
    assert len(list(cache.glob("*/doubled_kernel.cubin"))) == 1


def test_configurations_are_timed_as_long_as_asked(cache: Path) -> None:
    kernel = autotuned(SIZES)
    tune_briefly(3, 7)
    assert kernel.do_bench.keywords == {"warmup": 3, "rep": 7}
