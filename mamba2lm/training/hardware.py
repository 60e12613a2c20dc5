"""What the device can do at best, for MFU; and what it has in memory."""

from __future__ import annotations

import os
import time

import torch

# Dense bf16 peak with float32 accumulation, FLOP/s, from the vendors' data sheets.
_PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak matrix FLOP/s: by data sheet where known, else measured.

    Args:
        device: Where the model trains.
        dtype: Dtype of the matrix products.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for key in sorted(_PEAK_BF16, key=len, reverse=True):
            if key in name:
                return _PEAK_BF16[key]
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product here, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    # A generator of its own: the run's random numbers must not depend on when this is measured.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_in_use(device: torch.device) -> int:
    """Return peak bytes: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_available(device: torch.device) -> int:
    """Return the bytes free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room_left(device: torch.device) -> int | None:
    """Return the bytes that this process could use of a GPU beside the most it has used so far.

    A tenth of what it could have is left for fragments. None on a CPU, where nobody can tell.
    """
    if device.type != "cuda":
        return None
    within_reach = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(0.9 * within_reach) - torch.cuda.max_memory_allocated(device)


def readable_bytes(count: float) -> str:
    """Write a number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
