"""Check, time and tune the GPU kernels that memory bounds: causal convolution and RMS norms.

    python -m benchmarks.pointwise check                    awkward shapes against float64
    python -m benchmarks.pointwise time --out results.json  beside PyTorch and mamba-ssm
    python -m benchmarks.pointwise tune --out tuning.json   one kernel over its launches

Times are only reported of what was found correct in the same run. Times are those of the kernels
themselves; the ceiling is a copy of as many bytes, timed in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    FLOAT_LIMIT,
    HALF_LIMIT,
    environment,
    errors,
    kernel_times,
    need_gpu,
    poison,
    wall,
)
from mamba2lm.ops.causal_conv1d import launch as conv
from mamba2lm.ops.causal_conv1d.reference import causal_conv1d_taps
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.gated_rms_norm import launch as norm
from mamba2lm.ops.gated_rms_norm.reference import (
    gated_rms_norm_reference,
    rms_norm_reference,
    rms_norm_residual_reference,
)

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor | tuple[Tensor, Tensor]]
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator on one shape: batch, length, channels."""

    operator: str
    b: int
    length: int
    d: int
    projection: int = 0
    """Width of the projection of which one input is a slice; 0 for none."""
    offset: int = 0
    """Where in the projection the slice begins."""

    @property
    def name(self) -> str:
        return f"{self.operator} {self.b}x{self.length}x{self.d}"

    @property
    def bytes_moved(self) -> dict[str, int]:
        """Unavoidable bytes of the forward pass and of both, in bfloat16."""
        elements = self.b * self.length * self.d
        # Elements read and written, of two bytes: inputs and outputs, then what the backward pass
        # reads (inputs again, gradients) and writes. The residual stream has four bytes.
        forward, backward = {
            "conv": (2, 3),
            "gated": (3, 5),
            "norm": (2 + 1, 2 + 1 + 2),
            "residual": (1 + 2 + 1 + 2, 1 + 2 + 2 + 1 + 2),
        }[self.operator]
        return {"forward": 2 * elements * forward, "both": 2 * elements * (forward + backward)}


# Mamba-2 2.7B (16K tokens), 1.3B and 130M as their training runs have them, and one sequence.
CASES = (
    Case("conv", 4, 4096, 5376, 10576, 5120),
    Case("conv", 16, 2048, 1792, 3352, 1536),
    Case("conv", 1, 2048, 1792, 3352, 1536),
    Case("gated", 4, 4096, 5120, 10576),
    Case("gated", 16, 2048, 1536, 3352),
    Case("gated", 1, 2048, 1536, 3352),
    Case("norm", 4, 4096, 2560),
    Case("norm", 16, 2048, 768),
    Case("residual", 4, 4096, 2560),
    Case("residual", 16, 2048, 768),
)


def draw(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Inputs:
    """Draw inputs like a layer's: x of the convolution and z of the norm lie in a projection."""
    torch.manual_seed(seed)
    shape = (case.b, case.length, case.d)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda")

    wide = randn(*shape[:2], case.projection or case.d).to(dtype)
    sliced = wide[..., case.offset : case.offset + case.d]
    if case.operator == "conv":
        return {"x": sliced, "weight": randn(case.d, 4) / 2, "bias": randn(case.d)}
    weight = 1 + 0.1 * randn(case.d)
    if case.operator == "gated":
        return {"x": randn(*shape).to(dtype), "z": sliced, "weight": weight}
    stream = randn(*shape)
    if case.operator == "norm":
        return {"x": stream, "weight": weight}
    return {"x": randn(*shape).to(dtype), "residual": stream, "weight": weight}


def kernel(operator: str, dtype: torch.dtype) -> Function:
    """Return our kernels as a function of the inputs; ``dtype`` is that of layers."""

    def call(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        if operator == "conv":
            return conv.causal_conv1d_triton(
                inputs["x"], inputs["weight"], inputs["bias"], silu=True,
                initial_states=inputs.get("initial_states"), seq_idx=inputs.get("seq_idx"),
            )[0]  # fmt: skip
        z, residual = inputs.get("z"), inputs.get("residual")
        both = norm.rms_norm_triton(
            inputs["x"], inputs["weight"], EPS, z=z, residual=residual, dtype=dtype
        )
        return both if residual is not None else both[0]

    return call


def plain(operator: str, dtype: torch.dtype) -> Function:
    """Return the references, in plain PyTorch."""

    def call(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        x, weight = inputs["x"], inputs["weight"]
        if operator == "conv":
            ids = inputs.get("seq_idx")
            return F.silu(
                causal_conv1d_taps(
                    x, weight, inputs["bias"], initial_states_bwd=inputs.get("initial_states"),
                    document_bl=None if ids is None else document_ordinals(ids),
                )
            )  # fmt: skip
        if operator == "gated":
            return gated_rms_norm_reference(x, inputs["z"], weight, EPS, x.shape[-1])
        if operator == "norm":
            return rms_norm_reference(x, weight, EPS, dtype)
        return rms_norm_residual_reference(x, inputs["residual"], weight, EPS)

    return call


def peer(operator: str) -> Function | None:
    """Return mamba-ssm's Triton kernels as a function of the same inputs, where it has them."""
    spec = importlib.util.find_spec("mamba_ssm") if "mamba_ssm" not in sys.modules else None
    if spec is not None:
        # The package's own __init__ imports compiled extensions that these kernels do not need.
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
    if "mamba_ssm" not in sys.modules or operator == "conv":
        return None
    from mamba_ssm.ops.triton.layer_norm import (  # pyright: ignore[reportMissingImports]
        rms_norm_fn,
    )
    from mamba_ssm.ops.triton.layernorm_gated import (  # pyright: ignore[reportMissingImports]
        rmsnorm_fn,
    )

    def call(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        x, weight = inputs["x"], inputs["weight"]
        if operator == "gated":
            return rmsnorm_fn(x, weight, None, z=inputs["z"], eps=EPS, norm_before_gate=False)
        if operator == "norm":
            return rms_norm_fn(x, weight, None, eps=EPS)
        return rms_norm_fn(
            x, weight, None, residual=inputs["residual"], prenorm=True, residual_in_fp32=True,
            eps=EPS,
        )  # fmt: skip

    return call


def with_gradients(
    function: Function,
    inputs: Inputs,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return outputs and all gradients, the inputs cast to a dtype first if one is given."""
    leaves = {
        name: value.to(dtype or value.dtype).detach().requires_grad_()
        for name, value in inputs.items()
        if value.is_floating_point()
    }
    outputs = function({**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(device="cuda").manual_seed(3)
    weights = []
    for index, output in enumerate(outputs):
        drawn = torch.randn(output.shape, generator=generator, device="cuda")
        # The same values for every dtype: what arrives at y is of the dtype of layers.
        drawn = drawn.to(torch.bfloat16) if index == 0 else drawn
        weights.append(drawn.to(output.dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return {f"y{i}": output.detach() for i, output in enumerate(outputs)} | named


def check(case: Case, dtype: torch.dtype, *, packed: bool = False) -> dict[str, Any]:
    """Compare outputs and gradients with float64, twice, and say whether they are good enough."""
    inputs = draw(case, dtype)
    if case.operator == "conv" and packed:
        inputs["initial_states"] = torch.randn(case.b, 3, case.d, device="cuda").to(dtype)
        starts = torch.rand(case.b, case.length, device="cuda") < 0.05
        inputs["seq_idx"] = starts.long().cumsum(1) % 3
    ours, reference = kernel(case.operator, dtype), plain(case.operator, dtype)
    exact = with_gradients(plain(case.operator, torch.float64), inputs, torch.float64)
    poison()
    found = with_gradients(ours, inputs)
    poison()
    again = with_gradients(ours, inputs)
    identical = all(torch.equal(found[name], again[name]) for name in found)
    measured = errors(found, exact)
    if dtype == torch.float32:
        limits = dict.fromkeys(measured, FLOAT_LIMIT)
    else:
        limits = errors(with_gradients(reference, inputs), exact)
        limits = {name: HALF_LIMIT * max(value, 1e-6) for name, value in limits.items()}
    bad = {n: (e, limits[n]) for n, e in measured.items() if not e <= limits[n]}
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "packed": packed,
        "identical": identical,
        "errors": measured,
        "limits": limits,
        "bad": bad,
        "ok": identical and not bad,
    }


def small_cases() -> Iterator[tuple[Case, torch.dtype, bool]]:
    """List what is checked: awkward lengths, slices, widths with and without padding."""
    awkward = (Case("conv", 2, 1, 64), Case("conv", 2, 1000, 521, 999, 7))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for packed in (False, True):
            yield Case("conv", 2, 63, 776, 1624, 16), dtype, packed
        for operator in ("gated", "norm", "residual"):
            yield Case(operator, 2, 63, 768, 1560, 8), dtype, False
    for case in awkward:
        yield case, torch.bfloat16, True
    for length, d in ((1, 64), (300, 1001), (130, 5120)):
        for operator in ("gated", "norm", "residual"):
            yield Case(operator, 2, length, d, 2 * d + 24, 8), torch.bfloat16, False


def copy_bandwidth() -> float:
    """Measure a copy of the size of these problems, in bytes a second read plus written."""
    source = torch.randn(16384, 5376, device="cuda").to(torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = sum(kernel_times(lambda: target.copy_(source), repeats=20).values())
    return 2 * source.nbytes / milliseconds * 1e3


def passes(
    function: Function, inputs: Inputs, gradients: tuple[Tensor, ...]
) -> dict[str, Callable[[], object]]:
    """Return the forward pass alone and both passes as callables without arguments."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}

    def forward() -> object:
        with torch.no_grad():
            return function(inputs)

    def both() -> tuple[Tensor, ...]:
        outputs = function(leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, list(leaves.values()), gradients)

    return {"forward": forward, "both": both}


def time_case(case: Case, bandwidth: float) -> dict[str, Any]:
    """Time both passes of ours, of plain PyTorch and of the peer."""
    inputs = draw(case, torch.bfloat16)
    floor = {which: moved / bandwidth * 1e3 for which, moved in case.bytes_moved.items()}
    row: dict[str, Any] = {"case": case.name, "floor_ms": floor}
    contenders = {
        "ours": kernel(case.operator, torch.bfloat16),
        "pytorch": plain(case.operator, torch.bfloat16),
        "mamba_ssm": peer(case.operator),
    }
    for name, function in contenders.items():
        if function is None:
            continue
        row[name] = {}
        outputs = function(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = tuple(torch.randn_like(output) for output in outputs)
        for which, run in passes(function, inputs, gradients).items():
            by_kernel = kernel_times(run)
            row[name][which] = {
                "kernels_ms": sum(by_kernel.values()),
                "wall_ms": wall(run, seconds=0.1),
                "by_kernel_ms": by_kernel,
            }
    return row


def table(row: dict[str, Any]) -> str:
    """Format one row of times."""
    lines = []
    for which in ("forward", "both"):
        mine = row["ours"][which]
        text = f"{row['case']:24s} {which:8s} kernels {mine['kernels_ms']:7.4f}"
        text += f" wall {mine['wall_ms']['median']:7.4f} ms"
        text += f" ({100 * row['floor_ms'][which] / mine['kernels_ms']:3.0f}% of a copy)"
        for name in ("pytorch", "mamba_ssm"):
            if name in row:
                other = row[name][which]
                text += f" | {name} {other['kernels_ms']:7.4f} / {other['wall_ms']['median']:7.4f}"
        lines.append(text)
    return "\n".join(lines)


def launches(operator: str) -> dict[str, list[Any]]:
    """List what tuning tries for the forward and the backward kernel."""
    if operator == "conv":
        programs = (924, 1056, 1188, 2112, 4224, 8448)
        # Channels, warps, rows ahead, whether the next rows come early, registers.
        forward = (
            (256, 2, 4, False, None), (256, 2, 4, True, None), (256, 2, 2, True, None),
            (512, 4, 4, True, None), (256, 1, 4, False, None), (128, 1, 4, True, None),
        )  # fmt: skip
        backward = (
            (256, 2, 4, False, None), (256, 2, 4, True, None), (256, 2, 4, True, 128),
            (256, 2, 4, True, 112), (256, 2, 2, True, None), (256, 2, 2, True, 96),
            (256, 4, 4, True, None), (512, 4, 4, True, 128),
        )  # fmt: skip
        return {
            which: [
                conv.Blocks(channels, warps, ahead, count, early, registers)
                for (channels, warps, ahead, early, registers), count in itertools.product(
                    shapes, programs
                )
            ]
            for which, shapes in (("forward", forward), ("backward", backward))
        }
    return {
        "forward": [
            norm.Blocks(warps, elements, programs, stages)
            for warps, elements, stages, programs in itertools.product(
                (4, 8), (12, 32), (1, 3), (264, 528, 1056, 2112, 4224)
            )
        ],
        "backward": [
            norm.Blocks(warps, elements, programs, stages)
            for warps, elements, stages, programs in itertools.product(
                (2, 4, 8, 16), (6, 12, 16, 24), (1, 2, 3), (264, 396, 528, 1056, 2112)
            )
        ],
    }


def registers(module: Any, name: str) -> tuple[int, int] | None:
    """Return registers and spills of the kernel compiled last, where Triton tells."""
    compiled = list(getattr(module, name).device_caches[torch.cuda.current_device()][0].values())
    return (compiled[-1].n_regs, compiled[-1].n_spills) if compiled else None


def event_time(run: Callable[[], object], *, repeats: int = 15) -> float:
    """Return the median milliseconds between events around single calls."""
    for _ in range(2):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(
        b.elapsed_time(e) for b, e in zip(marks[::2], marks[1::2], strict=True)
    )


def tune(case: Case) -> list[dict[str, Any]]:
    """Time the kernels of one case under every launch of its list."""
    inputs = draw(case, torch.bfloat16)
    dy = torch.randn(case.b, case.length, case.d, device="cuda", dtype=torch.bfloat16)
    is_conv = case.operator == "conv"
    module = conv if is_conv else norm
    tuned = (module.FORWARD, module.BACKWARD)
    x, weight = inputs["x"], inputs["weight"]
    if is_conv:
        runs: dict[str, Callable[[], object]] = {
            "forward": lambda: conv.forward(x, weight, inputs["bias"], None, None, True, False),
            "backward": lambda: conv.backward(
                dy, None, x, weight, inputs["bias"], None, None, True
            ),
        }
        kernels = {"forward": "convolve_kernel", "backward": "convolve_backward_kernel"}
    else:
        z, residual = inputs.get("z"), inputs.get("residual")
        _, total, scale = norm.forward(x, z, residual, weight, EPS, case.d, torch.bfloat16)
        stream = total if residual is not None else x
        dtotal = torch.randn_like(stream) if residual is not None else None
        runs = {
            "forward": lambda: norm.forward(x, z, residual, weight, EPS, case.d, torch.bfloat16),
            "backward": lambda: norm.backward(
                dy, dtotal, stream, z, weight, scale, case.d, x.dtype
            ),
        }
        kernels = {"forward": "rms_norm_kernel", "backward": "rms_norm_backward_kernel"}
    room = "causal_conv1d" if is_conv else "gated_rms_norm"
    found = []
    for which, tried in launches(case.operator).items():
        source = importlib.import_module(f"mamba2lm.ops.{room}.{which}")
        for blocks in tried:
            both = (blocks, tuned[1]) if which == "forward" else (tuned[0], blocks)
            module.override_blocks(*both)
            entry: dict[str, Any] = {"case": case.name, "pass": which}
            entry["blocks"] = dataclasses.asdict(blocks)
            try:
                entry["ms"] = event_time(runs[which])
                entry["registers"] = registers(source, kernels[which])
            except Exception as error:  # what does not compile or fit is a result, recorded as one
                entry["ms"], entry["error"] = 1e9, f"{type(error).__name__}: {error}"[:200]
            found.append(entry)
    module.tuned_blocks()
    return sorted(found, key=lambda entry: (entry["pass"], entry["ms"]))


def main() -> int:
    """Run one command and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["check", "time", "tune"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="*", help="operators or names of cases; default all")
    parser.add_argument("--top", type=int, default=8, help="launches to print per kernel")
    arguments = parser.parse_args()
    need_gpu(parser)
    wanted = arguments.cases
    cases = [c for c in CASES if not wanted or c.operator in wanted or c.name in wanted]
    results: dict[str, Any] = {"environment": environment(), "rows": [], "checks": []}
    wrong: set[str] = set()
    for case, dtype, packed in small_cases() if arguments.command != "tune" else ():
        if case.operator in {c.operator for c in cases}:
            checked = check(case, dtype, packed=packed)
            results["checks"].append(checked)
            if not checked["ok"]:
                wrong.add(case.operator)
                sys.stdout.write(f"{case.name} {dtype}: WRONG {checked['bad']}\n")
    if arguments.command == "time":
        results["copy_bytes_per_second"] = bandwidth = copy_bandwidth()
        sys.stdout.write(f"copy: {bandwidth / 1e12:.3f} TB/s\n")
        for case in cases:
            if case.operator not in wrong:
                row = time_case(case, bandwidth)
                results["rows"].append(row)
                sys.stdout.write(table(row) + "\n")
                sys.stdout.flush()
    if arguments.command == "tune":
        for case in cases:
            if case.operator not in wrong:
                found = tune(case)
                results["rows"].extend(found)
                for which in ("forward", "backward"):
                    for entry in [e for e in found if e["pass"] == which][: arguments.top]:
                        sys.stdout.write(json.dumps(entry) + "\n")
                sys.stdout.flush()
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
