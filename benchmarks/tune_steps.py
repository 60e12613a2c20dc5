"""Choose how ``linear_step`` is launched on this GPU, and write it where the operator reads it.

    python -m benchmarks.tune_steps --out mamba2lm/ops/linear_step/tuned/sm90.json

For every product of the models' steps and every number of rows, candidates are compared with the
operators for the parts (a library's product among them), in whose place they are timed: a result
that is further off than theirs is refused. Weights change from call to call so that they come from
memory, as in a model, and so does what a convolution remembers. The products that take most of a
step come first, each is written as soon as it is known, and what the file knows of others stays.
With ``--part I/N`` only compiles every N-th candidate, to fill Triton's cache from several
processes first.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.generation import VOCAB_SIZE, recorded_us
from mamba2lm import ops
from mamba2lm.models import LanguageModel
from mamba2lm.ops import Convolution, Norm, Scale
from mamba2lm.ops.linear_step import launch
from mamba2lm.ops.linear_step.launch import Blocks

log = logging.getLogger(__name__)

MODELS = ("mamba2_2_7b", "mamba2_130m", "mamba1_2_8b", "mamba1_130m")
PROCESSORS = 132
"""Of an H100."""
STREAMED = 300e6
"""Bytes of different weights that are read in turn: several times what a cache holds."""


@dataclass(frozen=True)
class Product:
    """A product of a model's step and what stands around it."""

    n: int
    k: int
    convolved: int = 0
    """Outputs that are convolved."""
    normed: bool = False
    gated: bool = False
    residual: bool = False
    wide: bool = False
    """Whether the result is float32."""
    scaled: bool = False
    """Whether the kernel before leaves the squares of a gated norm."""


def products(preset: str) -> Iterator[Product]:
    """List the products of a preset's model."""
    with torch.device("meta"):
        model = LanguageModel(measure.preset(preset, [f"++vocab_size={VOCAB_SIZE}"]))
    mixer: Any = model.blocks[0].mixer
    shapes = {name: layer.weight.shape for name, layer in mixer.named_children()}
    yield Product(*shapes["in_proj"], convolved=shapes["conv1d"][0], normed=True)
    for name in ("x_proj", "dt_proj"):
        if name in shapes:
            yield Product(*shapes[name])
    gated = "norm" in shapes
    yield Product(*shapes["out_proj"], normed=gated, gated=gated, residual=True)
    yield Product(*model.embedding.weight.shape, normed=True, wide=True)


def candidates(product: Product, rows: int) -> list[Blocks]:
    """List ways to launch a product."""
    n, k = product.n, product.k
    if rows == 1:
        if k < 512:
            shapes = [(8, 256, 4, 1), (16, 256, 4, 1), (4, 256, 2, 1)]
        elif n < 1024 and k > 4096:
            shapes = [(1, 512, 4, 10), (1, 1024, 4, 5), (2, 1024, 4, 5)]
        elif k > 4096:
            shapes = [(4, 1024, 4, 5), (4, 512, 4, 10), (2, 1024, 4, 5), (2, 512, 4, 10)]
        else:
            shapes = [(8, 256, 4, 10), (4, 512, 4, 5), (4, 256, 4, 10), (2, 512, 4, 5)]
        return [Blocks(n=n, k=k, warps=w, ahead=a) for n, k, w, a in shapes]
    if rows <= 16:
        tiles = [(16, 256, 4, 4), (32, 256, 4, 4), (16, 512, 4, 3), (64, 128, 4, 4)]
    else:
        tiles = [(64, 64, 4, 6), (64, 128, 8, 4), (32, 128, 4, 4), (16, 256, 4, 3)]
    found = [
        Blocks(n=n, k=k, warps=w, rows=rows, stages=s, folded=False, ahead=4)
        for n, k, w, s in tiles
    ]
    if rows == 64 and not product.wide:
        # The rows as the left factor, and as many programs as there are processors, or two each.
        flipped = [(64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 4), (32, 128, 4, 3)]
        if product.n > 8192:  # few programs, which read x less often and need more on its way
            flipped.append((128, 64, 8, 6))
        for n, k, w, s in flipped:
            programs, most = -(-product.n // n), min(16, -(-product.k // k))
            splits = {1}
            if programs < 100:
                splits = {-(-PROCESSORS // programs), 2 * PROCESSORS // programs}
            found += [
                Blocks(n, k, w, rows, s, folded=False, ahead=4, split=split, flip=True)
                for split in sorted({min(split, most) for split in splits})
            ]
    if rows == 8 and product.normed:
        found.append(Blocks(n=16, k=256, warps=4, rows=rows, stages=3))
    return found


class Case:
    """A product with its inputs."""

    def __init__(self, product: Product, rows: int, copies: int) -> None:
        def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*shape, device="cuda").to(dtype)

        n, k = product.n, product.k
        self.weights = [torch.nn.Parameter(randn(n, k) * k**-0.5) for _ in range(copies)]
        stream = product.normed and not product.gated
        self.x = randn(rows, k, dtype=torch.float32 if stream else torch.bfloat16)
        self.given: dict[str, Any] = {}
        self.kept: Tensor | None = None
        if product.scaled:
            squares = randn(rows, k // 64, dtype=torch.float32).square() * 64
            self.given["scale"] = Scale(squares)
        elif product.normed:
            self.given["norm"] = Norm(torch.nn.Parameter(randn(k)))
        if product.gated and not product.scaled:
            self.given["gate"] = randn(rows, 2 * k)[:, :k]
        if product.residual:
            self.given["residual"] = randn(rows, n, dtype=torch.float32)
        if product.wide:
            self.given["out_dtype"] = torch.float32
        if product.convolved:
            c = product.convolved
            self.kept = randn(rows, 3, c)
            # Mamba-2's z comes before what is convolved; Mamba-1's after it.
            start = (n - c) // 2 if n % c else 0
            taps, bias = randn(c, 4), randn(c)
            self.convolutions = [
                Convolution(self.kept.clone(), taps, bias, start) for _ in range(copies)
            ]
            self.given["convolution"] = self.convolutions[0]

    def result(self) -> list[Tensor]:
        """Return what one call leaves."""
        if self.kept is None:
            return [ops.linear_step(self.x, self.weights[0], **self.given)]
        state = self.given["convolution"].state
        state.copy_(self.kept)
        return [ops.linear_step(self.x, self.weights[0], **self.given), state.clone()]

    def all(self) -> None:
        """Call it once with every weight."""
        for i, weight in enumerate(self.weights):
            if self.kept is not None:
                self.given["convolution"] = self.convolutions[i]
            ops.linear_step(self.x, weight, **self.given)


def leave_to_library(case: Callable[[], Any]) -> Any:
    """Call with the operators for the parts."""
    launch.choose_blocks = lambda *_, **__: None  # type: ignore[assignment]
    launch.override_blocks(None)
    return case()


def tune(product: Product, rows: int) -> dict[str, Any]:
    """Return an entry of the tuned file."""
    size = product.n * product.k * 2
    copies = max(2, min(24, int(STREAMED // size) + 1))
    # A library's product needs its inputs normalised.
    case = Case(product, rows, copies)
    library = leave_to_library(lambda: recorded_us(case.all, len(case.weights)))
    if product.gated and launch.scales(rows):
        product = replace(product, scaled=True)
        case = Case(product, rows, copies)
    expected = leave_to_library(case.result)
    timed: list[tuple[float, Blocks]] = []
    for blocks in candidates(product, rows):
        launch.override_blocks(blocks)
        try:
            found = case.result()
            error = max(relative(f, e) for f, e in zip(found, expected, strict=True))
            if error > 1e-2:
                log.warning("%s is off by %.1e", blocks, error)
                continue
            timed.append((recorded_us(case.all, len(case.weights)), blocks))
        except Exception as failure:
            log.warning("%s cannot be launched: %s", blocks, str(failure)[:200])
    launch.override_blocks(None)
    timed.sort(key=lambda pair: pair[0])
    best = timed[0] if timed and timed[0][0] < library else None
    return {
        "rows": rows,
        "n": product.n,
        "k": product.k,
        "use": None if best is None else asdict(best[1]),
        "us": {
            "library": round(library, 2),
            "kernels": [[round(t, 2), *asdict(b).values()] for t, b in timed[:3]],
        },
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference over the root mean square."""
    difference = (found.double() - expected.double()).square().mean()
    return (difference / expected.double().square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--rows", nargs="*", type=int, default=[64, 8, 1])
    parser.add_argument("--shapes", nargs="*", default=[], help="outputs x inputs: 10576x2560 …")
    parser.add_argument("--part", help="compile only, the I-th of N parts: I/N")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing new after these")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_grad_enabled(False)
    # Products that several models share are one; a head's result is wide in all of them. The first
    # of the models counts. A layer's largest products come first, in the models' order.
    named: dict[tuple[int, int], Product] = {}
    for name in options.models:
        for product in sorted(products(name), key=lambda p: (p.wide, -p.n * p.k)):
            named.setdefault((product.n, product.k), product)
    shapes = [p for p in named.values() if not options.shapes or f"{p.n}x{p.k}" in options.shapes]
    work = [(product, rows) for rows in options.rows for product in shapes]
    if options.part:
        place, parts = map(int, options.part.split("/"))
        each = [(product, rows, b) for product, rows in work for b in candidates(product, rows)]
        for product, rows, blocks in each[place::parts]:
            product = replace(product, scaled=product.gated and launch.scales(rows))
            launch.override_blocks(blocks)
            try:
                Case(product, rows, 1).result()
            except Exception as failure:
                log.warning("%s cannot be launched: %s", blocks, str(failure)[:200])
        return
    measure.need_gpu(parser)
    if options.out is None:
        parser.error("--out is missing")
    began = time.perf_counter()
    known: dict[tuple[int, int, int], dict[str, Any]] = {}
    if options.out.exists():
        entries = json.loads(options.out.read_text("utf-8"))["shapes"]
        known = {(e["rows"], e["n"], e["k"]): e for e in entries}
    for product, rows in work:
        if time.perf_counter() - began > options.seconds:
            log.warning("out of time before %s of %d rows", product, rows)
            break
        entry = tune(product, rows)
        log.info("%s", entry)
        known[rows, product.n, product.k] = entry
        write(options.out, list(known.values()))


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write the file that the operator reads, a shape a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    gpu = json.dumps(torch.cuda.get_device_name())
    path.write_text(f'{{\n "gpu": {gpu},\n "shapes": [\n{lines}\n ]\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
