"""Check, time and tune the selective scan's GPU kernels.

    python -m benchmarks.selective_scan check                    configurations against float64
    python -m benchmarks.selective_scan time --out results.json  forward and backward
    python -m benchmarks.selective_scan tune --out tuning.json   one kernel after another

Nothing is timed that was not found correct in the same run. mamba-ssm's scan is a CUDA extension;
it is not timed here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    COPY_BANDWIDTH,
    FLOAT_LIMIT,
    HALF_LIMIT,
    environment,
    errors,
    kernel_times,
    need_gpu,
    passes,
    poison,
    wall,
    with_gradients,
)
from mamba2lm.ops import selective_scan
from mamba2lm.ops.kernels import Launches
from mamba2lm.ops.selective_scan.launch import (
    Blocks,
    Config,
    choose_config,
    override_config,
)

EXPONENTIAL_RATE = 132 * 16 * 1.755e9
"""Exponentials a second of an H100: 16 per clock on each multiprocessor."""


@dataclass(frozen=True)
class Shape:
    """One problem size: batch, length, channels, state."""

    name: str
    b: int
    length: int
    d: int
    n: int = 16


SHAPES = (
    Shape("B8 L4096 D5120", 8, 4096, 5120),
    Shape("B16 L2048 D1536", 16, 2048, 1536),
    Shape("B1 L8192 D5120", 1, 8192, 5120),
    Shape("B1 L2048 D1536", 1, 2048, 1536),
    Shape("B8 L4096 D4096 N64", 8, 4096, 4096, 64),
)


def draw(shape: Shape, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """Draw inputs like a layer's: B, C and z are slices of projections."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    b, length, d, n = shape.b, shape.length, shape.d, shape.n
    rank = -(-d // 32)
    projected = randn(b, length, rank + 2 * n).to(dtype)
    rates = torch.arange(1, n + 1, device="cuda").float() * (0.5 + randn(d, 1).abs())
    return {
        "x": randn(b, length, d).to(dtype),
        "dt": randn(b, length, d).to(dtype),
        "A": -rates,
        "B": projected[..., rank : rank + n],
        "C": projected[..., rank + n :],
        "D": randn(d),
        "z": randn(b, length, 2 * d).to(dtype)[..., d:],
        "dt_bias": torch.rand(d, device="cuda", generator=generator) * 4.6 - 6.9,
    }


def triton(inputs: dict[str, Tensor], seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernels."""
    return selective_scan(
        **inputs, dt_softplus=True, return_final_states=True, seq_idx=seq_idx, impl="triton"
    )


def reference(inputs: dict[str, Tensor], seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the reference."""
    return selective_scan(
        **inputs, dt_softplus=True, return_final_states=True, seq_idx=seq_idx, impl="reference"
    )


def output(inputs: dict[str, Tensor]) -> Tensor:
    """Call the kernels as a layer in training does."""
    return selective_scan(**inputs, dt_softplus=True, impl="triton")


def check(shape: Shape, dtype: torch.dtype, *, packed: bool) -> dict[str, Any]:
    """Compare outputs and gradients with float64, twice, and say whether they are good enough."""
    inputs = draw(shape, dtype)
    inputs["initial_states"] = torch.randn(shape.b, shape.d, shape.n, device="cuda")
    ids = None
    if packed:
        ids = (torch.rand(shape.b, shape.length, device="cuda") < 0.01).cumsum(1) % 3
    gradients = (
        torch.randn(inputs["x"].shape, device="cuda").to(dtype),
        torch.randn(shape.b, shape.d, shape.n, device="cuda"),
    )
    exact = with_gradients(reference, inputs, ids, gradients, torch.float64)
    poison()
    found = with_gradients(triton, inputs, ids, gradients)
    poison()
    again = with_gradients(triton, inputs, ids, gradients)
    identical = all(torch.equal(found[name], again[name]) for name in found)
    measured = errors(found, exact)
    if dtype == torch.float32:
        limits = dict.fromkeys(measured, FLOAT_LIMIT)
    else:
        plain = errors(with_gradients(reference, inputs, ids, gradients), exact)
        limits = {name: HALF_LIMIT * max(value, 1e-6) for name, value in plain.items()}
    bad = {n: (e, limits[n]) for n, e in measured.items() if not e <= limits[n]}
    return {
        "shape": dataclasses.astuple(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "packed": packed,
        "identical": identical,
        "errors": measured,
        "bad": bad,
        "ok": identical and not bad,
    }


def roofline(shape: Shape, chunk: int, *, backward: bool) -> float:
    """Return the least milliseconds one pass can take: bytes or exponentials, the larger.

    Counts x, dt, z and y (backward: x, dt, z, dy, dx, ddt, dz) in bfloat16, the states of the
    chunks in float32, and one exponential per position, channel and state.
    """
    tokens, n = shape.b * shape.length, shape.n
    moved = tokens * (2 * (7 if backward else 4) * shape.d + 4 * n * (2 if backward else 1))
    moved += 4 * tokens * shape.d * n / chunk
    return max(moved / COPY_BANDWIDTH, tokens * shape.d * n / EXPONENTIAL_RATE) * 1e3


def config_of(shape: Shape) -> Config:
    """Return the shipped configuration for a shape."""
    major = torch.cuda.get_device_capability()[0]
    return choose_config(major, bits=16, rows=shape.b * shape.d, n=shape.n)


def time_shape(shape: Shape, *, gate: bool) -> dict[str, Any]:
    """Time both passes."""
    inputs = draw(shape, torch.bfloat16)
    if not gate:
        del inputs["z"]
    dy = torch.randn(inputs["x"].shape, device="cuda", dtype=torch.bfloat16)
    chunk = config_of(shape).chunk
    floor = {"forward": roofline(shape, chunk, backward=False)}
    floor["both"] = floor["forward"] + roofline(shape, chunk, backward=True)
    row: dict[str, Any] = {"shape": dataclasses.asdict(shape), "gate": gate, "floor": floor}
    for which, run in passes(output, inputs, dy).items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels = kernel_times(run, repeats=5)
        row[which] = {
            "kernels_ms": sum(kernels.values()),
            "wall_ms": wall(run, seconds=0.2),
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "by_kernel_ms": kernels,
        }
    return row


def table(row: dict[str, Any]) -> str:
    """Format one row of times."""
    lines = []
    for which in ("forward", "both"):
        mine = row[which]
        lines.append(
            f"{row['shape']['name']:20s} {'gate' if row['gate'] else 'no gate':8s}{which:8s}"
            f" kernels {mine['kernels_ms']:7.3f} wall {mine['wall_ms']['median']:7.3f} ms"
            f" ({100 * row['floor'][which] / mine['kernels_ms']:3.0f}% of roofline)"
        )
    return "\n".join(lines)


KERNELS = {"scan": "scan_kernel", "ends": "ends_kernel", "gradients": "gradients_kernel"}


def candidates(kernel: str, base: Config) -> list[Config]:
    """List what tuning tries for one kernel."""
    blocks: Blocks = getattr(base, kernel)
    replace = dataclasses.replace
    if kernel == "gradients":
        return [
            replace(base, keep=keep, gradients=replace(blocks, steps=steps, registers=registers))
            for steps, keep, registers in (
                (4, False, None), (2, False, None), (2, True, None), (2, False, 224),
                (2, True, 224), (2, False, 200),
            )
        ]  # fmt: skip
    return [
        replace(base, **{kernel: replace(blocks, steps=steps, registers=registers)})
        for steps in (4, 8)
        for registers in (None, 128, 160)
    ]


def tune(shape: Shape, kernel: str, tried: Iterable[Config]) -> list[dict[str, Any]]:
    """Time one kernel under many configurations, fastest first.

    They are compared with float64 from the fastest on, until one is right.
    """
    inputs = draw(shape, torch.bfloat16)
    dy = torch.randn(inputs["x"].shape, device="cuda", dtype=torch.bfloat16)
    run = passes(output, inputs, dy)["forward" if kernel == "scan" else "both"]
    found: list[tuple[dict[str, Any], Config]] = []
    for config in tried:
        override_config(config)
        times = kernel_times(run, repeats=3)
        entry: dict[str, Any] = {
            "blocks": dataclasses.asdict(getattr(config, kernel)),
            "keep": config.keep,
            "ms": times.get(KERNELS[kernel], 0.0),
            "all_ms": sum(times.values()),
        }
        sys.stdout.write(f"{shape.name} {kernel} {json.dumps(entry)}\n")
        sys.stdout.flush()
        found.append((entry, config))
    found.sort(key=lambda each: each[0]["all_ms"])
    for entry, config in found:
        override_config(config)
        checked = check(check_shape(shape), torch.bfloat16, packed=True)
        entry["ok"], entry["bad"] = checked["ok"], checked["bad"]
        if checked["ok"]:
            break
    override_config(None)
    return [entry for entry, _ in found]


def check_shape(shape: Shape) -> Shape:
    """Return a smaller problem of the same kind, on which float64 takes little time."""
    return dataclasses.replace(shape, b=2, length=1000, d=96)


def registers() -> dict[str, list[int]]:
    """Return the registers and spilled bytes per thread of every kernel compiled so far."""
    return {
        f"{key[1]} {name} {index}": [binary.n_regs, binary.n_spills]
        for index, (key, known) in enumerate(Launches._known.items())
        for name, binary in known.binaries.items()
    }


def main() -> int:
    """Run one command and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["check", "time", "tune"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="*", help="names of shapes; default all")
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS))
    arguments = parser.parse_args()
    need_gpu(parser)
    shapes = [s for s in SHAPES if not arguments.shapes or s.name in arguments.shapes]
    results: dict[str, Any] = {"environment": environment(), "rows": []}
    failed = False
    for shape in shapes:
        override_config(config_of(shape))
        checked = check(check_shape(shape), torch.bfloat16, packed=True)
        override_config(None)
        if not checked["ok"]:
            failed = True
            sys.stdout.write(f"{shape.name}: WRONG {checked['bad']}\n")
            results["rows"].append(checked)
            continue
        if arguments.command == "check":
            results["rows"].append(checked)
        elif arguments.command == "time":
            for gate in (True, False):
                row = time_shape(shape, gate=gate)
                results["rows"].append({**row, "errors": checked["errors"]})
                sys.stdout.write(table(row) + "\n")
        else:
            for name in arguments.kernels:
                found = tune(shape, name, candidates(name, config_of(shape)))
                results["rows"].append({"shape": shape.name, "kernel": name, "found": found})
                sys.stdout.write(f"best: {shape.name} {name} {json.dumps(found[0])}\n")
        sys.stdout.flush()
        results["registers"] = registers()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
