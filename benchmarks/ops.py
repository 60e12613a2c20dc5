"""Check, time and tune the SSD's GPU kernels, side by side with mamba-ssm when it is installed.

    python -m benchmarks.ops check                    every configuration against float64
    python -m benchmarks.ops time --out results.json  forward and backward, kernels and wall
    python -m benchmarks.ops lengths --out l.json     time per token against length, and attention's
    python -m benchmarks.ops tune --out tuning.json --tuned mamba2lm/ops/ssd/tuned/sm90.json
    python -m benchmarks.ops compile --jobs 16        what tuning will try, beforehand
    python -m benchmarks.ops compile-peer --jobs 16   what mamba-ssm's autotuners will, for time

Nothing is timed that was not found correct in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.autotuning import compile_ahead, tune_briefly
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
from mamba2lm.ops.discretisation import step_sizes
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.ssd.launch import (
    Blocks,
    Config,
    choose_config,
    override_config,
    ssd_triton,
)
from mamba2lm.ops.ssd.reference import ssd_chunked

MATRIX_RATE = 6.9e14
"""Floating-point operations a second of a large bf16 product there."""


@dataclass(frozen=True)
class Shape:
    """One problem size: batch, length, heads, head dim, groups, state."""

    name: str
    b: int
    length: int
    h: int
    p: int = 64
    g: int = 1
    n: int = 128


SHAPES = (
    Shape("S*", 8, 4096, 80),
    Shape("B1 L8192 H80", 1, 8192, 80),
    Shape("B1 L2048 H80", 1, 2048, 80),
    Shape("B8 L2048 H24", 8, 2048, 24),
    Shape("B1 L65536 H64", 1, 65536, 64),
    Shape("B4 L8192 H64", 4, 8192, 64),
    Shape("S* N64", 8, 4096, 80, n=64),
    Shape("S* N256", 8, 4096, 80, n=256),
    Shape("S* G8", 8, 4096, 80, g=8),
)


def draw(
    shape: Shape, dtype: torch.dtype, *, seed: int = 0, initial: bool = True, decay: float = 1.0
) -> dict[str, Tensor]:
    """Draw inputs like a layer's: x, B and C are slices of one projection."""
    torch.manual_seed(seed)
    b, length, h, p, g, n = shape.b, shape.length, shape.h, shape.p, shape.g, shape.n
    device = "cuda"
    fused = torch.randn(b, length, h * p + 2 * g * n, device=device).to(dtype)
    x, B, C = fused.split([h * p, g * n, g * n], dim=-1)
    drawn = {
        "x": x.view(b, length, h, p),
        "dt": torch.randn(b, length, h, device=device).to(dtype),
        "A": -decay * (1 + 15 * torch.rand(h, device=device)),
        "B": B.view(b, length, g, n),
        "C": C.view(b, length, g, n),
        "D": torch.randn(h, device=device),
        "dt_bias": torch.rand(h, device=device) * 4.6 - 6.9,
    }
    if initial:
        drawn["initial_states"] = torch.randn(b, h, p, n, device=device)
    return drawn


def reference(inputs: dict[str, Tensor], document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the SSD in plain PyTorch, in the dtype of the inputs."""
    x, D = inputs["x"], inputs["D"]
    delta = step_sizes(inputs["dt"], dt_bias=inputs["dt_bias"], dt_softplus=True)
    y, state = ssd_chunked(
        (x * delta.unsqueeze(-1)).to(x.dtype),
        delta * inputs["A"].to(delta.dtype),
        inputs["B"],
        inputs["C"],
        initial_states_bhpn=inputs.get("initial_states"),
        document_bl=document,
    )
    return torch.addcmul(y, x, D.unsqueeze(-1).to(y.dtype)), state


def kernel(inputs: dict[str, Tensor], document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the SSD with the Triton kernels."""
    tensors: dict[str, Any] = {**inputs}
    return ssd_triton(**tensors, dt_softplus=True, document=document)


def documents(shape: Shape, *, mean: int) -> Tensor:
    """Draw document ordinals with boundaries every ``mean`` positions on average."""
    torch.manual_seed(1)
    ids = (torch.rand(shape.b, shape.length, device="cuda") < 1 / mean).cumsum(1) % 3
    return document_ordinals(ids)


def check(
    shape: Shape, dtype: torch.dtype, *, packed: int = 0, decay: float = 1.0, initial: bool = True
) -> dict[str, Any]:
    """Compare outputs and gradients with float64, twice, and say whether they are good enough."""
    inputs = draw(shape, dtype, decay=decay, initial=initial)
    document = documents(shape, mean=packed) if packed else None
    torch.manual_seed(2)
    gradients = (
        torch.randn(inputs["x"].shape, device="cuda").to(dtype),
        torch.randn(shape.b, shape.h, shape.p, shape.n, device="cuda"),
    )
    exact = with_gradients(reference, inputs, document, gradients, torch.float64)
    poison()
    found = with_gradients(kernel, inputs, document, gradients)
    poison()
    again = with_gradients(kernel, inputs, document, gradients)
    identical = all(torch.equal(found[name], again[name]) for name in found)
    measured = errors(found, exact)
    if dtype == torch.float32:
        limits = dict.fromkeys(measured, FLOAT_LIMIT)
    else:
        plain = errors(with_gradients(reference, inputs, document, gradients), exact)
        limits = {name: HALF_LIMIT * max(value, 1e-6) for name, value in plain.items()}
    bad = {n: (e, limits[n]) for n, e in measured.items() if not e <= limits[n]}
    return {
        "shape": dataclasses.astuple(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "packed": packed,
        "decay": decay,
        "identical": identical,
        "errors": measured,
        "limits": limits,
        "bad": bad,
        "ok": identical and not bad,
    }


def ours(inputs: dict[str, Tensor]) -> Tensor:
    """Call the kernels as a layer in training does."""
    return kernel(inputs, None)[0]


def peer(chunk_size: int) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """Return mamba-ssm's SSD as a function of the same inputs, or None if it is missing."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            return None
        # The package's own __init__ imports compiled extensions that its SSD does not need.
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    def call(inputs: dict[str, Tensor]) -> Tensor:
        tensors = dict(inputs)
        positional = [tensors.pop(name) for name in ("x", "dt", "A", "B", "C")]
        return mamba_chunk_scan_combined(*positional, chunk_size, dt_softplus=True, **tensors)

    return call


def roofline(shape: Shape, *, backward: bool) -> float:
    """Return the least milliseconds one pass can take: bytes or operations, the larger."""
    tokens = shape.b * shape.length
    hp, gn = shape.h * shape.p, shape.g * shape.n
    q = 64
    operations = tokens * (q * gn + q * hp + 4 * hp * shape.n)
    moved = tokens * (4 * hp + 4 * gn + 2 * shape.h)
    if backward:
        operations = tokens * (3 * q * gn + 2 * q * hp + 10 * hp * shape.n)
        moved = tokens * (6 * hp + 8 * gn + 4 * shape.h)
    return max(operations / MATRIX_RATE, moved / COPY_BANDWIDTH) * 1e3


def time_shape(shape: Shape, peer_chunks: Iterable[int]) -> dict[str, Any]:
    """Time both passes of ours and of the peer at its chunk sizes, in one process."""
    inputs = draw(shape, torch.bfloat16, initial=False)
    dy = torch.randn(inputs["x"].shape, device="cuda", dtype=torch.bfloat16)
    floor = {"forward": roofline(shape, backward=False)}
    floor["both"] = floor["forward"] + roofline(shape, backward=True)
    row: dict[str, Any] = {"shape": dataclasses.asdict(shape), "floor": floor}
    contenders: dict[str, Callable[[dict[str, Tensor]], Tensor] | None] = {"ours": ours}
    contenders |= {f"peer{q}": peer(q) for q in peer_chunks}
    for name, function in contenders.items():
        if function is None:
            continue
        row[name] = {"kept_bytes": kept_memory(function, inputs)}
        for which, run in passes(function, inputs, dy).items():
            kernels = kernel_times(run)
            row[name][which] = {
                "kernels_ms": sum(kernels.values()),
                "wall_ms": wall(run),
                "wall_one_thread_ms": wall(run, threads=False),
                "by_kernel_ms": kernels,
            }
    return row


def run_peer(shapes: list[Shape], chunks: list[int]) -> None:
    """Call both passes of the peer once; for ``compile_ahead``, which lets them compile only."""
    for shape, chunk in itertools.product(shapes, chunks):
        function = peer(chunk)
        if function is None:
            sys.exit("error: mamba-ssm is not installed.")
        # Two rows are as many as eight to the compiler, which asks whether 16 divides a number.
        inputs = draw(dataclasses.replace(shape, b=min(shape.b, 2)), torch.bfloat16, initial=False)
        for run in passes(function, inputs, torch.randn_like(inputs["x"])).values():
            run()


def kept_memory(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, its output among them."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = function(leaves)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del y
    return kept


def attention(inputs: dict[str, Tensor]) -> Tensor:
    """Call causal flash attention; q, k and v are (b, h, l, p)."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"], is_causal=True)


def time_lengths(lengths: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Time 32K tokens (or one longer sequence) at some lengths, as a model of width 2048.

    Its SSD has 64 heads of 64, its attention 16 heads of 128.
    """
    for length in lengths:
        b = max(1, 2**15 // length)
        row: dict[str, Any] = {"length": length, "batch": b}
        contenders: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
            f"ssd_n{n}": (
                ours,
                draw(Shape("", b, length, 64, n=n), torch.bfloat16, initial=False),
            )
            for n in (64, 128)
        }
        if length <= 2**15:
            shape = (b, 16, length, 128)
            qkv = {k: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for k in "qkv"}
            contenders["attention"] = (attention, qkv)
        for name, (function, inputs) in contenders.items():
            dy = torch.randn_like(function(inputs))
            for which, run in passes(function, inputs, dy).items():
                milliseconds = sum(kernel_times(run, repeats=5).values())
                row[f"{name}_{which}_us_per_1k_tokens"] = milliseconds * 1e3 / (b * length / 1024)
        numbers = "  ".join(f"{k.removesuffix('_us_per_1k_tokens')} {v:.1f}"
                            for k, v in row.items() if k not in ("length", "batch"))  # fmt: skip
        sys.stdout.write(f"{length:7d}  microseconds per 1K tokens: {numbers}\n")
        sys.stdout.flush()
        yield row


def table(row: dict[str, Any]) -> str:
    """Format one row of times: kernels, wall, and wall with the backward pass on one thread."""
    lines = []
    peers = [row[name] for name in row if name.startswith("peer")]
    for which in ("forward", "both"):
        mine = row["ours"][which]
        share = 100 * row["floor"][which] / mine["kernels_ms"]
        text = f"{row['shape']['name']:14s} {which:7s} ({share:2.0f}% of roofline)"
        for label, take in (
            ("kernels", lambda entry: entry["kernels_ms"]),
            ("wall", lambda entry: entry["wall_ms"]["median"]),
            ("one thread", lambda entry: entry["wall_one_thread_ms"]["median"]),
        ):
            text += f" | {label} {take(mine):6.3f}"
            if peers:
                other = min(take(entry[which]) for entry in peers)
                text += f" peer {other:6.3f} {other / take(mine):5.2f}x"
        lines.append(text)
    text = f"{'':14s} kept for the backward pass: {row['ours']['kept_bytes'] / 2**20:.0f} MiB"
    if peers:
        text += f", peer {min(entry['kept_bytes'] for entry in peers) / 2**20:.0f} MiB"
    return "\n".join([*lines, text])


FORWARD = ("fused", "states", "scan")

SCHEDULES = (
    ("chunk", ("states_backward", "through", "within")),
    ("forward_chunk", ("fused",)),
    ("forward_chunk", ("states", "scan")),
)
"""Which field of ``Config`` is the chunk of which kernels."""

KERNELS = {
    "fused": "fused_kernel",
    "states": "states_kernel",
    "states_backward": "states_kernel",
    "scan": "scan_kernel",
    "through": "through_states_kernel",
    "within": "within_kernel",
}


def tried_blocks(kernel_name: str, *, wide: bool) -> list[tuple[int, Blocks]]:
    """List what tuning tries for one kernel: a chunk and how to launch it.

    Args:
        kernel_name: A field of ``Config``.
        wide: Whether the state has more than 128 columns.
    """
    if kernel_name == "fused" and wide:  # a program's state is all its registers
        return [
            (64, Blocks(w, s, p, direct=True))
            for w, s, p in ((8, 1, 64), (8, 2, 64), (8, 2, 32), (4, 1, 32))
        ]
    if kernel_name == "fused":
        return [
            (64, Blocks(4, s, p, direct=direct))
            for s, p, direct in (
                (1, 64, False), (1, 64, True), (2, 64, True), (3, 64, True), (2, 32, True),
                (3, 32, True),
            )
        ]  # fmt: skip
    if kernel_name in ("states", "states_backward"):
        return [
            (q, Blocks(w, s, 64, n, direct=direct))
            for q, w, s, n, direct in (
                (64, 4, 3, 64, False), (64, 8, 3, 64, False), (64, 4, 3, 128, False),
                (64, 8, 3, 128, False), (64, 8, 4, 128, False), (64, 4, 3, 64, True),
                (64, 4, 4, 64, True), (64, 4, 3, 128, True), (128, 8, 2, 64, False),
                (128, 8, 3, 64, False), (128, 8, 2, 128, False), (128, 8, 3, 128, False),
                (128, 4, 2, 64, True), (128, 4, 3, 64, True),
            )
        ]  # fmt: skip
    if kernel_name == "scan":
        return [
            (q, Blocks(w, s, programs=k))
            for q, w, s, k in ((64, 4, 3, 528), (128, 8, 2, 528), (128, 8, 3, 528),
                               (128, 8, 3, 1056))
        ]  # fmt: skip
    if kernel_name == "through":
        return [
            (q, Blocks(w, s, n=n, programs=k))
            for q, w, n in (
                *(((64, 8, 256),) if wide else ()),
                (64, 4, 64), (64, 4, 128), (64, 8, 128), (128, 8, 64), (128, 8, 128),
            )
            for s in (2, 3)
            for k in (528, 2112)
        ]  # fmt: skip
    return [
        (q, Blocks(w, s, programs=k))
        for q, w in ((64, 4), *(((64, 8),) if wide else ()), (128, 8))
        for s in (1, 2, 3)
        for k in (132, 264)
    ]


def candidates(kernel_name: str, shape: Shape, base: Config) -> list[Config]:
    """List the configurations that tuning tries for one kernel."""
    tried = tried_blocks(kernel_name, wide=shape.n > 128)
    if kernel_name in FORWARD:
        return [
            dataclasses.replace(base, forward_chunk=q, **{kernel_name: blocks})
            for q, blocks in tried
        ]
    # What the kernels beside it can be launched with at another chunk.
    fitting: dict[str, Any] = {
        "states_backward": Blocks(8, 2), "through": Blocks(8, 2, n=64), "within": Blocks(8, 1),
    }  # fmt: skip
    return [
        dataclasses.replace(
            base, **{**({} if q == base.chunk else fitting), "chunk": q, kernel_name: blocks}
        )
        for q, blocks in tried
    ]


def compile_once(shape: Shape, config: Config) -> str:
    """Run what ``tune`` will, on small problems, so that Triton's cache holds the binaries."""
    override_config(config)
    try:
        inputs = draw(
            dataclasses.replace(shape, b=2, length=2048, h=64), torch.bfloat16, initial=False
        )
        for run in passes(ours, inputs, torch.randn_like(inputs["x"])).values():
            run()
        small = check_shape(shape)
        inputs = draw(small, torch.bfloat16)
        gradients = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_states"])
        with_gradients(kernel, inputs, documents(small, mean=300), gradients)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def check_shape(shape: Shape) -> Shape:
    """Return a smaller problem of the same kind, on which float64 takes little time."""
    return dataclasses.replace(shape, b=2, length=1000, h=64)


def tune(shape: Shape, kernel_name: str, tried: Iterable[Config]) -> list[dict[str, Any]]:
    """Time one kernel under many configurations, fastest first.

    They are compared with float64 from the fastest on, until one is right for every chunk.
    """
    inputs = draw(shape, torch.bfloat16, initial=False)
    dy = torch.randn(inputs["x"].shape, device="cuda", dtype=torch.bfloat16)
    which = "forward" if kernel_name in FORWARD else "both"
    run = passes(ours, inputs, dy)[which]
    found: list[tuple[float, dict[str, Any], Config]] = []
    for config in tried:
        override_config(config)
        entry: dict[str, Any] = {
            "blocks": dataclasses.asdict(getattr(config, kernel_name)),
            "chunk": config.forward_chunk if kernel_name in FORWARD else config.chunk,
            "ms": math.inf,
        }
        try:
            entry["ms"] = kernel_times(run, repeats=3)[KERNELS[kernel_name]]
        except Exception as error:  # what does not compile or fit is a result, recorded as one
            entry["error"] = f"{type(error).__name__}: {error}"[:200]
        sys.stdout.write(f"{shape.name} {kernel_name} {json.dumps(entry)}\n")
        sys.stdout.flush()
        found.append((entry["ms"], entry, config))
    found.sort(key=lambda each: each[0])
    settled: set[int] = set()
    for _, entry, config in found:
        if entry["chunk"] not in settled and "error" not in entry:
            override_config(config)
            checked = check(check_shape(shape), torch.bfloat16, packed=300)
            entry["ok"], entry["bad"] = checked["ok"], checked["bad"]
            if checked["ok"]:
                settled.add(entry["chunk"])
    override_config(None)
    return [entry for _, entry, _ in found]


CLASSES: tuple[tuple[str, str, dict[str, tuple[int, int]]], ...] = (
    ("S* N256", "fused states scan states_backward through within", {"state": (8193, 16384)}),
    ("S*", "fused states scan states_backward through within", {"rows": (377, 10**9)}),
    (
        "B4 L8192 H64",
        "fused states scan states_backward through within",
        {"rows": (192, 264)},
    ),
    (
        "B1 L65536 H64",
        "states scan states_backward through within",
        {"length": (16385, 10**12)},
    ),
    ("B1 L8192 H80", "states scan states_backward through within", {}),
)
"""Shape, kernels and bounds of each entry that ``tune`` writes."""


def best_config(found: dict[str, list[dict[str, Any]]], base: Config) -> dict[str, Any]:
    """Put the fastest correct choice for every kernel together as the entry of a tuned file.

    Kernels of one schedule must agree on a chunk: the sum of their times decides, and so it does
    between the two forward schedules where both were tried. Where not all kernels of a schedule
    were, its chunk stays.

    Args:
        found: What ``tune`` returned, by kernel.
        base: The configuration before.
    """
    good = {name: [e for e in entries if e.get("ok")] for name, entries in found.items()}

    def fastest(name: str, q: int) -> dict[str, Any]:
        return next((e for e in good[name] if e["chunk"] == q), {"ms": math.inf})

    chosen: dict[str, Any] = {}
    forward_ms = math.inf
    for key, names in SCHEDULES:
        tried = [name for name in names if name in good]
        if not tried:
            continue
        chunks = (64, 128) if len(tried) == len(names) else (getattr(base, key),)
        times = {q: sum(fastest(name, q)["ms"] for name in tried) for q in chunks}
        chunk = min(times, key=lambda q: times[q])
        if times[chunk] == math.inf:
            continue
        if key == "forward_chunk":
            if times[chunk] >= forward_ms:
                continue
            forward_ms = times[chunk]
            if "fused" in good:
                chosen["fused"] = None
        chosen[key] = chunk
        chosen |= {name: fastest(name, chunk)["blocks"] for name in tried}
    return chosen


@dataclass(frozen=True)
class Work:
    """One kernel to tune for one class of shapes."""

    shape: Shape
    kernel_name: str
    base: Config
    tried: list[Config]


def tuning_work(shapes: list[str] | None, kernels: list[str] | None) -> list[Work]:
    """List what to tune, all classes and kernels by default.

    Where only some kernels of a schedule are, they keep the chunk that it has.
    """
    by_name = {shape.name: shape for shape in SHAPES}
    work: list[Work] = []
    for shape_name, all_names, _ in CLASSES:
        if shapes is not None and shape_name not in shapes:
            continue
        shape = by_name[shape_name]
        config = shipped_config(shape)
        names = [name for name in all_names.split() if kernels is None or name in kernels]
        for name in names:
            chunked = name in ("states", "scan")
            base = dataclasses.replace(config, fused=None) if chunked else config
            tried = candidates(name, shape, base)
            key, together = next((k, t) for k, t in SCHEDULES if name in t)
            if not set(together) <= set(names):
                tried = [c for c in tried if getattr(c, key) == getattr(base, key)]
            work.append(Work(shape, name, base, tried))
    return work


def compile_all(work: list[Work], jobs: int) -> None:
    """Compile what tuning will try in several processes, which share Triton's cache."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.starmap(compile_once, [(w.shape, c) for w in work for c in w.tried], 1)


def tune_all(work: list[Work], out: Path | None, tuned: Path | None) -> list[dict[str, Any]]:
    """Tune one kernel after another; write all timings, and entries of a tuned file."""
    rows: list[dict[str, Any]] = []
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    bases: dict[str, Config] = {}
    for each in work:
        found = tune(each.shape, each.kernel_name, each.tried)
        results.setdefault(each.shape.name, {})[each.kernel_name] = found
        bases.setdefault(each.shape.name, each.base)
        rows.append({"shape": each.shape.name, "kernel": each.kernel_name, "found": found})
        sys.stdout.write(f"best: {each.shape.name} {each.kernel_name} {json.dumps(found[0])}\n")
        sys.stdout.flush()
        if out:
            out.write_text(json.dumps(rows, indent=1) + "\n")
    if tuned:
        bounds = {name: when for name, _, when in CLASSES}
        entries = json.loads(tuned.read_text())
        for name, found_by_kernel in results.items():
            entry = next(e for e in entries if _pairs(e["when"]) == _pairs(bounds[name]))
            entry["use"] |= best_config(found_by_kernel, bases[name])
        tuned.write_text(json.dumps(entries, indent=1) + "\n")
    return rows


def shipped_config(shape: Shape) -> Config:
    """Return the configuration that a shape has in the repository, in bfloat16."""
    return choose_config(
        torch.cuda.get_device_capability()[0],
        bits=16, rows=shape.b * shape.h, length=shape.length, p=shape.p, n=shape.n,
    )  # fmt: skip


def _pairs(bounds: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(pair) for name, pair in bounds.items()}


COMMANDS = ("check", "time", "lengths", "tune", "compile", "compile-peer")


def main() -> int:
    """Run one command and write its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tuned", type=Path, help="file of block sizes that tune rewrites")
    parser.add_argument("--shapes", nargs="*", help="names of shapes; default all")
    parser.add_argument("--kernels", nargs="*", help="names of kernels, for tune; default all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2**k for k in range(11, 19)])
    parser.add_argument("--peer-chunks", nargs="*", type=int, default=[128, 256])
    arguments = parser.parse_args()
    need_gpu(parser)
    if arguments.command == "compile-peer":
        shapes = [s for s in SHAPES if not arguments.shapes or s.name in arguments.shapes]
        work = functools.partial(run_peer, shapes, arguments.peer_chunks)
        for line in compile_ahead(work, arguments.jobs):
            sys.stdout.write(line[:300] + "\n")
        return 0
    if arguments.command in ("tune", "compile"):
        work = tuning_work(arguments.shapes, arguments.kernels)
        if arguments.jobs > 1 or arguments.command == "compile":
            compile_all(work, arguments.jobs)
        if arguments.command == "compile":
            return 0
        rows = tune_all(work, arguments.out, arguments.tuned)
        return int(not all(any(e.get("ok") for e in row["found"]) for row in rows))
    results: dict[str, Any] = {"environment": environment(), "rows": []}
    if arguments.command == "lengths":
        for row in time_lengths(arguments.lengths):
            results["rows"].append(row)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        return 0
    tune_briefly()
    failed = False
    for shape in SHAPES:
        if arguments.shapes and shape.name not in arguments.shapes:
            continue
        override_config(shipped_config(shape))
        checked = check(check_shape(shape), torch.bfloat16, packed=300)
        override_config(None)
        if not checked["ok"]:
            failed = True
            sys.stdout.write(f"{shape.name}: WRONG {checked['bad']}\n")
            results["rows"].append(checked)
        elif arguments.command == "check":
            results["rows"].append(checked)
        else:
            row = time_shape(shape, arguments.peer_chunks)
            results["rows"].append({**row, "errors": checked["errors"]})
            sys.stdout.write(table(row) + "\n")
        sys.stdout.flush()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
