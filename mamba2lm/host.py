"""Settings of the host that make a CPU train at a useful rate."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def tune_host(threads: int | None = None) -> None:
    """Set torch's thread count, flush denormals to zero, make glibc keep large freed blocks.

    Without the last, every large activation is mapped afresh and its pages zeroed by the kernel at
    first touch, which costs more than the arithmetic of an elementwise pass (measured: a causal
    convolution of 16×512×640 runs 1.5 to 3.5 times faster after this).

    Args:
        threads: Intra-op threads; None keeps OMP_NUM_THREADS or torch's choice.
    """
    # A state that nothing feeds decays into denormal numbers, whose arithmetic takes a slow path:
    # measured on a 4-layer Mamba-2, 38 tokens/s instead of 220. Threads inherit the setting when
    # they start, so it comes first.
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    # The tokenizers library warns when a process forks after using its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def cpu_has_fast_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX)."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capability:
        return bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
