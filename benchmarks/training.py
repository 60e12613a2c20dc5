"""Time whole training steps on a GPU, say where the time goes, and compare losses.

    python -m benchmarks.training time --models mamba2_130m transformer_130m mamba2_1_3b@8
    python -m benchmarks.training losses --out losses.json --plot losses.png
    python -m benchmarks.training compile-peer --jobs 16    what mamba-ssm's autotuning will

A step is what the trainer does: bf16 autocast over float32 weights, loss on random tokens, backward
pass, clipping, loss and norm read back, then AdamW (``--adamw``: ours in one pass, or PyTorch's
fused one). ``--cuda-graph`` replays forward and backward pass as ``training.cuda_graph`` does.
Kernels' times are means of several steps under the profiler, so that clocks are those of a run;
``idle`` is what their timeline leaves open, with the longest gaps by the kernels around it, and
``busy_ms`` the rest of a step. A host that is slow or shared shows in steps that take longer than
that, and than the best of them. ``mfu`` counts three forward passes of ``flops_per_token``
(products of the model and its operators; nothing for recomputation) against the rate of an 8192³
bf16 product measured in the same run over half a second; ``mfu_6n`` counts six times the parameters
a token.

``losses`` trains one model from the same weights on the same bytes several times: with the kernels
and either AdamW, with PyTorch's operations in bf16 and in float32, and with mamba-ssm where it is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import lzma
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn

import mamba2lm
from benchmarks.autotuning import compile_ahead, tune_briefly
from benchmarks.measure import environment, need_gpu
from mamba2lm.cli import CONFIGS, typed
from mamba2lm.config import TrainConfig
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.ops import causal_conv1d, kernels
from mamba2lm.training.adamw import AdamW
from mamba2lm.training.graph import WARM_UP, CudaRecorder, StepGraphs, Tensors
from mamba2lm.training.optimizer import AdamWImpl, OptimizerConfig, Optimizers
from mamba2lm.training.parallelize import compile_blocks

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("softmax", "nll", "logsumexp")),
    ("ssd", ("fused_kernel", "states_kernel", "through_states", "within_kernel", "steps_")),
    ("scan or ssd", ("scan_kernel", "ends_kernel", "pass_kernel", "gradients_kernel")),
    ("conv", ("convolve",)),
    ("norm", ("rms_norm",)),
    ("sums of ours", ("reduce_kernel", "partial_sums", "rows_backward", "reduce_rows")),
    ("attention", ("flash", "fmha", "attention")),
    ("mlp and rotary", ("swiglu", "rotary")),
    ("matmul", ("gemm", "cutlass", "nvjet", "cublas", "matmul")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lpnorm")),
    ("compiled", ("triton_",)),
)
"""Names of kernels, in lower case, by what they are for; the first that matches counts."""

BYTES = 256
"""Vocabulary of the loss comparison."""

RUNS = (
    "kernels, bf16", "kernels and AdamW in one pass, bf16", "PyTorch, bf16", "PyTorch, float32",
    "mamba-ssm, bf16",
)  # fmt: skip
"""What it compares."""

KERNELS, ONE_PASS, HALF, FLOAT, PEER = RUNS

PROFILED = 3
"""Steps that the profiler looks at."""


def group_of(kernel: str) -> str:
    """Return what a kernel is for."""
    name = kernel.lower()
    for group, parts in GROUPS:
        if any(part in name for part in parts):
            return group
    return "elementwise, copies and the rest"


def compose(model: str, *overrides: str) -> TrainConfig:
    """Compose the training configuration of a model preset."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(hydra_compose("train", overrides=[f"model={model}", *overrides]), TrainConfig)


def product_rate(size: int = 8192, seconds: float = 0.5) -> float:
    """Return the FLOP/s of a bf16 product that goes on long enough for clocks to settle."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    torch.mm(a, b)
    torch.cuda.synchronize()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for _ in range(10):
            torch.mm(a, b)
        torch.cuda.synchronize()
        count += 10
    return 2 * size**3 * count / elapsed


@dataclass
class Subject:
    """What is timed: a model, how it gives its loss, and what a token costs."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor | None], Tensor]
    """Of ids (b, l + 1) and document ids (b, l) or None."""
    flops_per_token: float

    @classmethod
    def ours(cls, config: ModelConfig, length: int) -> Subject:
        """Build a model of this package on the GPU."""
        with torch.device("cuda"):
            model = LanguageModel(config)
            model.init_weights(0)
        return cls(
            model,
            lambda ids, seq_idx: model(ids[:, :-1], ids[:, 1:], seq_idx=seq_idx).loss,
            model.flops_per_token(length),
        )

    @classmethod
    def peer(cls, config: ModelConfig, length: int, *, our_convolution: bool = True) -> Subject:
        """Build mamba-ssm's model with the same weights; see ``peer_model``."""
        like = cls.ours(config, length)
        assert isinstance(like.model, LanguageModel)
        model = peer_model(like.model, our_convolution=our_convolution)

        def loss(ids: Tensor, _: Tensor | None) -> Tensor:
            logits = model(ids[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

        return cls(model, loss, like.flops_per_token)

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def step_function(
    subject: Subject,
    ids: Tensor,
    seq_idx: Tensor | None,
    *,
    rate: float = 1e-3,
    adamw: AdamWImpl = AdamWImpl.auto,
    graphs: StepGraphs | None = None,
) -> Callable[[], float]:
    """Return one training step without arguments; it returns the loss.

    Args:
        subject: What learns.
        ids: (b, l + 1).
        seq_idx: Document ids (b, l), or None.
        rate: Learning rate.
        adamw: ``optimizer.impl``; of models of ours.
        graphs: Replay passes by these, reading from the host's memory as in training.
    """
    model = subject.model
    clip, update = _updates(model, rate, adamw)
    inputs = {"ids": ids} if seq_idx is None else {"ids": ids, "seq_idx": seq_idx}
    if graphs is not None:
        inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
        if ids.is_cuda:
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}

    def learn(inputs: Tensors) -> Tensors:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = subject.loss(inputs["ids"], inputs.get("seq_idx"))
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        return {"loss": loss.detach()}

    def step() -> float:
        found = learn(inputs) if graphs is None else graphs.run(learn, inputs, first=True)
        norm = clip()
        values = torch.stack([found["loss"], norm]).tolist()
        update()
        return values[0]

    return step


def _updates(
    model: nn.Module, rate: float, adamw: AdamWImpl
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Return what clips gradients, returning their norm, and what updates and drops them."""
    if isinstance(model, LanguageModel):
        ours = Optimizers(OptimizerConfig(learning_rate=rate, impl=adamw), model)

        def clip_ours() -> Tensor:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            ours.clip(norm, 1.0)
            return norm

        def update_ours() -> None:
            ours.step()
            ours.zero_grad()

        return clip_ours, update_ours
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def update_theirs() -> None:
        theirs.step()
        theirs.zero_grad(set_to_none=True)

    return lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0), update_theirs


@dataclass(frozen=True)
class Interval:
    """A kernel's time on the device, microseconds."""

    begin: float
    end: float
    name: str


def device_kernels(profile: torch.profiler.profile) -> list[Interval]:
    """Return what ran on the GPU under a profiler: kernels, copies and fills."""
    assert profile.profiler is not None
    # Not profile.events(), which takes long for the kernels of several steps.
    return [
        Interval(e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3, e.name())
        for e in profile.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]


def gaps(kernels_run: list[Interval]) -> list[tuple[float, str, str]]:
    """Return when no kernel ran, in order: microseconds, the kernel before, the kernel after."""
    found = []
    last: Interval | None = None
    for kernel in sorted(kernels_run, key=lambda kernel: kernel.begin):
        if last is not None and kernel.begin > last.end:
            found.append((kernel.begin - last.end, last.name, kernel.name))
        if last is None or kernel.end > last.end:
            last = kernel
    return found


def longest_gaps(found: list[tuple[float, str, str]], steps: int, most: int = 8) -> dict[str, Any]:
    """Sum gaps up by the kernels around them: milliseconds and number a step, the longest first."""
    sums: dict[str, list[float]] = {}
    for micros, before, after in found:
        entry = sums.setdefault(f"{short_name(before)[:48]} | {short_name(after)[:48]}", [0.0, 0.0])
        entry[0] += micros / 1e3 / steps
        entry[1] += 1 / steps
    return dict(sorted(sums.items(), key=lambda item: -item[1][0])[:most])


def documents(batch: int, length: int, mean: int) -> Tensor:
    """Draw document ids whose documents are ``mean`` tokens long on average."""
    starts_bl = torch.rand(batch, length, device="cuda") < 1 / mean
    return starts_bl.cumsum(dim=1)


def measure(
    name: str,
    batch: int,
    length: int,
    peak: float,
    *,
    compiled: bool = False,
    mean_document: int | None = None,
    keep_outputs: bool = False,
    adamw: AdamWImpl = AdamWImpl.auto,
    cuda_graph: bool = False,
    steps: int = 12,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Time one model.

    Args:
        name: Preset, after "peer:" for mamba-ssm's model of its shape.
        batch: Sequences.
        length: Tokens of each.
        peak: FLOP/s that MFU is of.
        compiled: Whether blocks go through torch.compile, as ``training.compile`` does.
        mean_document: Mean length of packed documents; None packs none.
        keep_outputs: Whether mixers do, as ``training.keep_outputs`` has them.
        adamw: ``optimizer.impl``; of models of ours.
        cuda_graph: Whether passes are replayed, as ``training.cuda_graph`` has them; of models of
            ours that are not compiled.
        steps: How many to time.
        overrides: Of the configuration.
    """
    config = compose(name.removeprefix("peer:"), *overrides).model
    config.validate()
    build = Subject.peer if name.startswith("peer:") else Subject.ours
    subject = build(config, length)
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size or 0, (batch, length + 1), device="cuda")
    for block in subject.model.blocks if isinstance(subject.model, LanguageModel) else ():
        block.mixer.keep_outputs = keep_outputs
    if compiled and isinstance(subject.model, LanguageModel):
        compile_blocks(subject.model, ids.device)
    seq_idx = None if mean_document is None else documents(batch, length, mean_document)
    graphs = None
    if cuda_graph:
        assert isinstance(subject.model, LanguageModel), "graphs are for models of ours"
        graphs = StepGraphs(subject.model.parameters(), ids.device, CudaRecorder(ids.device))
    step = step_function(subject, ids, seq_idx, adamw=adamw, graphs=graphs)
    for number in range(WARM_UP + 2):
        if number == WARM_UP:  # a recording takes what its replays use
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    memory, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
    if graphs is not None:
        graphs.close()
    kernels_run = device_kernels(profile)
    times: dict[str, tuple[float, float]] = {}
    for kernel in kernels_run:
        ms, count = times.get(kernel.name, (0.0, 0.0))
        taken = (kernel.end - kernel.begin) / 1e3 / PROFILED
        times[kernel.name] = ms + taken, count + 1 / PROFILED
    groups: dict[str, float] = {}
    for name_of_kernel, (ms, _) in times.items():
        group = group_of(name_of_kernel)
        groups[group] = groups.get(group, 0.0) + ms
    second = statistics.median(seconds)
    found = gaps(kernels_run)
    groups["idle"] = sum(micros for micros, _, _ in found) / 1e3 / PROFILED
    span = max(k.end for k in kernels_run) - min(k.begin for k in kernels_run)
    busy_ms = span / 1e3 / PROFILED - groups["idle"]
    tokens = batch * length
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:24]
    return {
        "model": name,
        "parameters": subject.parameter_count(),
        "batch": batch,
        "length": length,
        "compiled": compiled,
        "keep_outputs": keep_outputs,
        "cuda_graph": cuda_graph,
        "adamw": adamw.value,
        "mean_document": mean_document,
        "step_ms": second * 1e3,
        "step_ms_low_high": [min(seconds) * 1e3, max(seconds) * 1e3],
        "busy_ms": busy_ms,
        "tokens_per_second": tokens / second,
        "tokens_per_second_best": tokens / min(seconds),
        "tokens_per_second_busy": tokens / busy_ms * 1e3,
        "mfu": 3 * subject.flops_per_token * tokens / second / peak,
        "mfu_6n": 6 * subject.parameter_count() * tokens / second / peak,
        "peak_memory_gib": memory / 2**30,
        "reserved_memory_gib": reserved / 2**30,
        "launches": len(kernels_run) // PROFILED,
        "groups_ms": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "largest_kernels_ms": {short_name(kernel): list(taken) for kernel, taken in largest},
        "longest_gaps_ms": longest_gaps(found, PROFILED),
    }


def short_name(kernel: str) -> str:
    """Return a kernel's name without what its templates repeat."""
    return kernel.replace("at::native::", "").replace("(anonymous namespace)::", "")[:120]


def describe(row: dict[str, Any]) -> str:
    """Return one line about a measured model."""
    extra = "".join(
        f" {word}" for word, on in (
            ("compiled", row["compiled"]), ("packed", row["mean_document"]),
            ("keeping outputs", row["keep_outputs"]), ("replayed", row["cuda_graph"]),
            ("with PyTorch's AdamW", row["adamw"] == "torch"),
        )
        if on
    )  # fmt: skip
    return (
        f"{row['model']}@{row['batch']}x{row['length']}{extra}: "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_ms']:.1f} ms "
        f"(best {row['step_ms_low_high'][0]:.1f}, busy {row['busy_ms']:.1f}), "
        f"MFU {row['mfu']:.1%} (6N {row['mfu_6n']:.1%}), {row['peak_memory_gib']:.1f} GiB "
        f"({row['reserved_memory_gib']:.1f} reserved), "
        f"{row['launches']} launches; "
        + ", ".join(f"{k} {v:.1f}" for k, v in row["groups_ms"].items())
    )


def time_models(arguments: argparse.Namespace) -> None:
    """Measure every model that is asked for."""
    tune_briefly()
    peak = product_rate()
    results: dict[str, Any] = {"environment": environment(), "peak_tflops": peak / 1e12, "rows": []}
    replayed = {"off": (False,), "on": (True,), "both": (False, True)}[arguments.cuda_graph]
    for entry, cuda_graph in itertools.product(arguments.models, replayed):
        name, _, batch = entry.partition("@")
        row = measure(
            name, int(batch or arguments.batch), arguments.length, peak,
            compiled=arguments.compile, mean_document=arguments.documents,
            keep_outputs=arguments.keep_outputs, adamw=AdamWImpl(arguments.adamw),
            cuda_graph=cuda_graph, steps=arguments.steps,
        )  # fmt: skip
        results["rows"].append(row)
        sys.stdout.write(describe(row) + "\n")
        sys.stdout.flush()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def peer_pass(name: str, batch: int, length: int) -> None:
    """Run one layer of mamba-ssm's model of a shape forward and back; it need not be right."""
    changes = "model.n_layers=1", "model.vocab_size=512"
    subject = Subject.peer(compose(name, *changes).model, length)
    ids = torch.zeros(batch, length + 1, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = subject.loss(ids, None)
    loss.backward()


def compile_peer(arguments: argparse.Namespace) -> None:
    """Compile what the peer's autotuners will choose from when its models are timed."""
    for entry in arguments.models:
        name, _, batch = entry.partition("@")
        work = functools.partial(peer_pass, name, int(batch or 16), arguments.length)
        for line in compile_ahead(work, arguments.jobs):
            sys.stdout.write(line[:300] + "\n")


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Have every operator take PyTorch's operations."""
    with mock.patch.object(kernels, "TRITON_INSTALLED", False):
        yield


def batches(steps: int, batch: int, length: int) -> Tensor:
    """Return bytes of the packaged novels at random places, (steps, batch, length + 1)."""
    corpus = Path(mamba2lm.__file__).parent / "data" / "corpora" / "austen.txt.xz"
    text = torch.frombuffer(bytearray(lzma.decompress(corpus.read_bytes())), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - length - 1, (steps, batch, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long().cuda()


def train(subject: Subject, data: Tensor, *, bf16: bool, one_pass: bool = False) -> list[float]:
    """Train with AdamW at a fixed rate after a warm-up; return the loss of every step."""
    parameters = [{"params": list(subject.model.parameters()), "weight_decay": 0.1}]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = AdamW(parameters, **settings) if one_pass else None
    optimizer = ours or torch.optim.AdamW(parameters, **settings, fused=True)
    losses = []
    for step, ids in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
            loss = subject.loss(ids, None)
        loss.backward()
        if ours is None:
            nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
        else:
            gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
            ours.prepare((1.0 / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def peer_model(ours: LanguageModel, *, our_convolution: bool) -> nn.Module:
    """Build mamba-ssm's model with the same weights.

    Its Triton kernels run without its CUDA extensions, which need building: an empty module stands
    in for the one that its package imports.

    Args:
        ours: Whose weights and shape it gets.
        our_convolution: Whether our kernel stands in for its CUDA one; otherwise PyTorch's does,
            which is slow.

    Raises:
        ImportError: mamba-ssm is not installed.
    """
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    import mamba_ssm.modules.mamba2 as layer  # pyright: ignore[reportMissingImports]
    from mamba_ssm.models.config_mamba import (  # pyright: ignore[reportMissingImports]
        MambaConfig,
    )
    from mamba_ssm.models.mixer_seq_simple import (  # pyright: ignore[reportMissingImports]
        MambaLMHeadModel,
    )

    def convolve(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return causal_conv1d(x.transpose(1, 2), weight, **options).transpose(1, 2)

    layer.causal_conv1d_fn = convolve if our_convolution else None
    config = ours.config
    peer = MambaLMHeadModel(
        MambaConfig(
            d_model=config.d_model,
            n_layer=config.n_layers,
            vocab_size=ours.vocab_size,
            ssm_cfg={"layer": "Mamba2", "use_mem_eff_path": False},
            pad_vocab_size_multiple=config.vocab_multiple,
        ),
        device="cuda",
    )
    prefixed = {
        ("" if name.startswith("lm_head") else "backbone.") + name: tensor
        for name, tensor in ours.state_dict().items()
    }
    peer.load_state_dict(prefixed)
    return peer


def compare_losses(arguments: argparse.Namespace) -> None:
    """Train with and without the kernels and with the peer, and record every loss."""
    sizes = {"n_layers": arguments.layers, "vocab_size": BYTES}
    config = compose("mamba2_130m", *(f"model.{key}={value}" for key, value in sizes.items())).model
    config.validate()
    data = batches(arguments.steps, arguments.batch, arguments.length)

    def ours(*, bf16: bool, one_pass: bool = False) -> list[float]:
        subject = Subject.ours(config, arguments.length)
        return train(subject, data, bf16=bf16, one_pass=one_pass)

    def reference(*, bf16: bool) -> list[float]:
        with without_kernels():
            return ours(bf16=bf16)

    def peer() -> list[float]:
        subject = Subject.peer(config, arguments.length, our_convolution=False)
        return train(subject, data, bf16=True)

    runs: dict[str, Callable[[], list[float]]] = {
        KERNELS: lambda: ours(bf16=True),
        ONE_PASS: lambda: ours(bf16=True, one_pass=True),
        HALF: lambda: reference(bf16=True),
        FLOAT: lambda: reference(bf16=False),
        PEER: peer,
    }
    results: dict[str, Any] = {
        "environment": environment(),
        "model": "mamba2_130m", **sizes, "batch": arguments.batch, "length": arguments.length,
        "losses": {}, "seconds": {}, "absent": {},
    }  # fmt: skip
    for name in arguments.runs:
        begin = time.perf_counter()
        try:
            losses = runs[name]()
        except ImportError as error:
            results["absent"][name] = str(error)
            continue
        results["losses"][name] = losses
        results["seconds"][name] = time.perf_counter() - begin
        last = statistics.fmean(losses[-20:])
        sys.stdout.write(f"{name}: {last:.4f} nats over the last 20 of {len(losses)} steps\n")
        sys.stdout.flush()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot and FLOAT in results["losses"]:
        plot(results["losses"], arguments.plot)


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Draw losses over each other, and below them their difference from float32's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
    truth = losses[FLOAT]
    for name, values in losses.items():
        above.plot(values, label=name, linewidth=1)
        below.plot([v - t for v, t in zip(values, truth, strict=True)], label=name, linewidth=1)
    above.set_ylabel("loss, nats per byte")
    above.legend()
    below.set_ylabel("minus float32's")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("time", help="time steps")
    timed.add_argument(
        "--models",
        nargs="+",
        default=["mamba2_130m"],
        help="presets, with a batch as NAME@BATCH; mamba-ssm's as peer:NAME",
    )
    timed.add_argument("--batch", type=int, default=16)
    timed.add_argument("--length", type=int, default=2048)
    timed.add_argument("--steps", type=int, default=12)
    timed.add_argument("--documents", type=int, help="mean length of packed documents")
    timed.add_argument("--compile", action="store_true")
    timed.add_argument("--keep-outputs", action="store_true")
    timed.add_argument(
        "--cuda-graph",
        choices=["off", "on", "both"],
        default="off",
        help="replay passes; both times every model without and with",
    )
    timed.add_argument("--adamw", choices=[kind.value for kind in AdamWImpl], default="auto")
    timed.add_argument("--out", type=Path)
    compiled = commands.add_parser("compile-peer", help="compile what the peer's autotuners will")
    compiled.add_argument("--models", nargs="+", default=["mamba2_130m"], help="NAME or NAME@BATCH")
    compiled.add_argument("--length", type=int, default=2048)
    compiled.add_argument("--jobs", type=int, default=1, help="processes that compile")
    compared = commands.add_parser("losses", help="train several ways and compare")
    compared.add_argument("--layers", type=int, default=8)
    compared.add_argument("--batch", type=int, default=8)
    compared.add_argument("--length", type=int, default=512)
    compared.add_argument("--steps", type=int, default=200)
    compared.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    compared.add_argument("--out", type=Path)
    compared.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if (
        arguments.command == "time"
        and arguments.cuda_graph != "off"
        and (arguments.compile or any(name.startswith("peer:") for name in arguments.models))
    ):
        parser.error("--cuda-graph is for models of ours, and not with --compile")
    need_gpu(parser)
    commands_by_name = {
        "time": time_models, "compile-peer": compile_peer, "losses": compare_losses
    }  # fmt: skip
    commands_by_name[arguments.command](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
