"""Time training in several layouts of the processes, and compare what they learn.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.parallel \
        --model mamba2_1_3b --layout data_replicate=2 --layout data_shard=2 --layout tensor=2 \
        --batch 16 --micro-batch 4 --length 2048 --out results.json
    torchrun --nproc-per-node 1 -m benchmarks.parallel …      one process: what the rest compare to
    … --cuda-graph           where nobody divides tokens, again with passes replayed, as
                             training.cuda_graph does
    … --losses 200           the loss of every step besides, to lay layouts over each other
    … --checkpoint FOLDER    saves beside training, and reads back in every layout asked for
    … --read FOLDER          loss of the next step after reading what such a run has saved

A layout is written as the keys of ``parallel``, joined by commas; what is left over replicates. The
text is the package's own, read as bytes. Nothing is timed whose loss differs from the first
layout's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from benchmarks.measure import preset
from mamba2lm.cli import fail
from mamba2lm.data import DataConfig, TokenizerConfig, TokenizerKind, prepare_data
from mamba2lm.data.batches import training_batches
from mamba2lm.data.loader import Corpus
from mamba2lm.distributed import Mesh, ParallelConfig, World
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.checkpoint import newest_valid
from mamba2lm.schema import ConfigError, from_mapping
from mamba2lm.training.checkpoint import Checkpointer, Progress, restore
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.graph import WARM_UP, Tensors, step_graphs
from mamba2lm.training.hardware import memory_in_use
from mamba2lm.training.optimizer import OptimizerConfig, Optimizers
from mamba2lm.training.parallelize import ParallelModel, start_accelerator
from mamba2lm.training.precision import autocast
from mamba2lm.training.profile import profile_step
from mamba2lm.training.run_folder import RunFolder

LOSS_TOLERANCE = 2e-2
"""How far the losses of the first steps may lie apart: bfloat16 sums in another order."""
COMPARED = WARM_UP + 3
"""Steps whose losses are compared."""


def layout(text: str) -> ParallelConfig:
    """Read ``tensor=2,context=2`` or ``data_replicate=2``."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        fields[key] = value == "true" if value in ("true", "false") else int(value)
    return from_mapping(ParallelConfig, fields, "parallel")


class Run:
    """A model in one layout, with an optimizer and its share of the samples."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        corpus: Corpus,
        accelerator: Accelerator,
        arguments: argparse.Namespace,
        *,
        replayed: bool = False,
    ) -> None:
        self.device, self.dtype = accelerator.device, getattr(torch, arguments.dtype)
        rank, size = accelerator.process_index, accelerator.num_processes
        self.mesh = Mesh(parallel, rank=rank, processes=size, device=self.device)
        self.world = World(rank, size, self.device, copies=self.mesh.copies)
        with self.device:
            model = LanguageModel(config)
            model.init_weights(0)
        if size > 1:  # the random numbers of a device may be its own
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
        self.model = model
        self.parallel = ParallelModel(
            model,
            self.mesh,
            accelerator,
            dtype=self.dtype,
            activation_checkpointing=arguments.recompute,
            compile=arguments.compile,
        )
        training = TrainingConfig(cuda_graph=replayed, compile=arguments.compile)
        self.graphs = step_graphs(training, self.mesh, self.device, model.parameters())
        self.optimizers = Optimizers(OptimizerConfig(learning_rate=3e-4), model)
        self.micro_batch = arguments.micro_batch
        self.micro_steps, rest = divmod(
            arguments.batch, arguments.micro_batch * self.mesh.data_size
        )
        assert rest == 0, "--batch is a multiple of the micro-batches of all processes"
        assert self.micro_steps, "--batch is at least a micro-batch a process"
        self.tokens = arguments.batch * arguments.length
        self.corpus = corpus
        self.before_update: Callable[[], None] = lambda: None
        self.from_the_first_sample()

    def from_the_first_sample(self) -> None:
        """Go on with the first sample, whatever was taken before."""
        self.batches = training_batches(
            self.corpus.train,
            start=0,
            micro_batch=self.micro_batch,
            rank=self.mesh.data_rank,
            world_size=self.mesh.data_size,
            pin_memory=self.device.type == "cuda",
        )

    def learn(self, inputs: Tensors) -> Tensors:
        """Add a micro-batch's gradient, times its ``share``, to the parameters'."""
        with autocast(self.device, self.dtype):
            loss = self.parallel.call(
                inputs["input_ids"],
                inputs["labels"],
                seq_idx=inputs.get("seq_idx"),
                loss_reduction="sum",
            ).loss
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward(inputs["share"])
        return {"loss": loss.detach()}

    def close(self) -> None:
        """Give back what was recorded."""
        if self.graphs is not None:
            self.graphs.close()

    def step(self) -> Tensor:
        """Take one step; return its loss, not waited for."""
        total = torch.zeros((), device=self.device)
        share = self.world.size // self.world.copies / self.tokens
        for i in range(self.micro_steps):
            batch = next(self.batches)
            if self.mesh.context is not None:
                batch = {k: self.mesh.context.stretch(v) for k, v in batch.items()}
            inputs = {**batch, "share": torch.full((), share, device=self.device)}
            with self.parallel.micro_batch(last=i == self.micro_steps - 1):
                if self.graphs is not None:
                    found = self.graphs.run(self.learn, inputs, first=i == 0)
                else:
                    found = self.learn(
                        {k: v.to(self.device, non_blocking=True) for k, v in inputs.items()}
                    )
            total += found["loss"]
        self.parallel.finish_gradients()
        self.optimizers.clip(self.parallel.gradient_norm(), 1.0)
        self.before_update()
        self.optimizers.step()
        self.optimizers.zero_grad()
        return total

    def loss(self) -> float:
        """Take one step; return its mean loss over all tokens."""
        return self.world.sum_over_tokens(self.step()).item() / self.tokens

    def timed(self) -> float:
        """Take one step; return its seconds."""
        self.wait()
        begin = time.perf_counter()
        self.step()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait for the device and for every process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.world.barrier()

    def profile(self, kernels: int) -> dict[str, Any]:
        """Profile a step.

        Args:
            kernels: How many kernels to list, those that take longest.

        Returns:
            Shares of the step's time in NCCL, in NCCL with nothing else going on, and with nothing
            going on at all, which the host is to blame for; and the kernels' milliseconds.
        """
        if self.device.type != "cuda":
            return {}
        self.wait()
        with profile_step(self.device) as profile:
            self.step()
            self.wait()
        row: dict[str, Any] = {
            "nccl_share": profile.communication,
            "exposed_nccl_share": profile.exposed,
            "idle_share": profile.idle,
        }
        if kernels:
            slowest = list(profile.kernels.items())[:kernels]
            row["kernels"] = {name: [round(ms, 3), n] for name, (ms, n) in slowest}
        return row


def measure(
    run: Run, arguments: argparse.Namespace, expected: list[float] | None, alone: float | None
) -> dict[str, Any]:
    """Compare the losses of some steps, which warm up too, then time steps.

    Args:
        run: The layout.
        arguments: Number of steps.
        expected: The first layout's losses; one that differs is not timed.
        alone: Tokens per second of one process, to compare with.

    Returns:
        Figures of all processes.
    """
    first = [run.loss() for _ in range(WARM_UP)]
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    first += [run.loss() for _ in range(COMPARED - WARM_UP)]  # which record, and are replayed
    pairs = zip(first, expected or first, strict=True)
    if any(abs(ours - theirs) > LOSS_TOLERANCE for ours, theirs in pairs):
        return {"first_losses": first, "wrong": f"the first layout has {expected}"}
    seconds = sorted(run.timed() for _ in range(arguments.steps))
    median = statistics.median(seconds)
    memory = run.world.gather(memory_in_use(run.device))
    speed = run.tokens / median
    compared = {} if alone is None else {
        "times_one_process": speed / alone, "efficiency": speed / alone / run.world.size,
    }  # fmt: skip
    return {
        "first_losses": first,
        "seconds": {
            "median": median,
            "p10": seconds[len(seconds) // 10],
            "p90": seconds[-1 - len(seconds) // 10],
        },
        "tokens_per_second": speed,
        **compared,
        "memory_bytes_max": int(memory.max()),
        **run.profile(arguments.kernels),
    }  # fmt: skip


def save_and_read_back(run: Run, folder: Path, others: list[Run], usual: float) -> dict[str, Any]:
    """Save twice beside training; read the second save in other layouts.

    Returns:
        Seconds that the call and the slowest step beside the writing took longer than a step.
    """
    path = RunFolder(folder)
    if run.world.is_main:
        path.write_config({"model": run.model.config.resolved(), "training": {}})
    run.wait()
    saver = Checkpointer(path, run.parallel, run.optimizers, run.world, keep_last=2)
    run.before_update = saver.wait_until_copied
    figures: dict[str, Any] = {"usual_step_seconds": usual}
    run.step()
    saver.poll()  # which begins to get memory
    run.step()
    for number in (1, 2):
        run.wait()
        begin = time.perf_counter()
        saver.save(Progress(step=number))
        called = time.perf_counter() - begin
        slowest = 0.0
        while saver.busy:
            begin = time.perf_counter()
            run.step()
            saver.poll()
            run.wait()
            slowest = max(slowest, time.perf_counter() - begin)
        figures[f"save_{number}"] = {"call_seconds": called, "slowest_step_seconds": slowest}
    run.wait()
    expected = None
    for other in [run, *others]:
        loss = loss_after_reading(other, folder)
        expected = loss if expected is None else expected
        figures.setdefault("losses_after_reading", []).append(loss)
        assert abs(loss - expected) < LOSS_TOLERANCE, (loss, expected)
    return figures


def loss_after_reading(run: Run, folder: Path) -> float:
    """Take a step on the first samples from the newest checkpoint in a folder; return its loss."""
    found = newest_valid(folder)
    assert found is not None
    restore(found, run.parallel, run.optimizers)
    run.from_the_first_sample()
    return run.loss()


def environment(device: torch.device) -> dict[str, Any]:
    """Say on what this ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, gloo"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": name,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
    }


def ways_of(
    arguments: argparse.Namespace, processes: int
) -> Iterator[tuple[str, ParallelConfig, bool]]:
    """Yield the layouts asked for, by default plain data parallelism, and whether to replay."""
    for text in arguments.layout or ["tensor=1"]:
        parallel = layout(text)
        yield text, parallel, False
        if arguments.cuda_graph and parallel.degrees(processes).tensor == processes:
            yield text, parallel, True


def main() -> None:
    """Read the command line, run every layout, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mamba2_370m", help="a name in configs/model")
    parser.add_argument("--change", action="append", default=[], help="of the model: n_layers=6")
    parser.add_argument("--layout", action="append", help="e.g. tensor=2,data_shard=2")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, of all processes")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--losses", type=int, default=0, help="steps whose loss is written down")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true", help="also replay what can be")
    parser.add_argument("--checkpoint", type=Path, help="folder to save in")
    parser.add_argument("--read", type=Path, help="folder to read from")
    parser.add_argument("--kernels", type=int, default=0, help="kernels to list of a profile")
    parser.add_argument("--alone", type=Path, help="figures of one process, to compare with")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    accelerator = start_accelerator()
    config = preset(arguments.model, arguments.change)
    config.fit_vocabulary(257)
    data = DataConfig(
        tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        sequence_length=arguments.length,
        reset_at_documents=False,
    )
    corpus = prepare_data(
        data, seed=0, is_main=accelerator.is_main_process, wait=accelerator.wait_for_everyone
    )
    alone = None
    if arguments.alone is not None:
        alone = json.loads(arguments.alone.read_text())["layouts"][0]["tokens_per_second"]
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        **environment(accelerator.device),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "layouts": rows,
    }

    def write() -> None:
        if accelerator.is_main_process and arguments.out is not None:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    runs: list[tuple[Run, float]] = []
    for text, parallel, replayed in ways_of(arguments, accelerator.num_processes):
        run = Run(config, parallel, corpus, accelerator, arguments, replayed=replayed)
        expected = rows[0]["first_losses"] if rows else None
        row = {"layout": text, "cuda_graph": replayed, **measure(run, arguments, expected, alone)}
        if arguments.read is not None:
            row["loss_after_reading"] = loss_after_reading(run, arguments.read)
        if arguments.losses:
            run.close()
            del run
            run = Run(config, parallel, corpus, accelerator, arguments, replayed=replayed)
            row["losses"] = [run.loss() for _ in range(arguments.losses)]
        rows.append(row)
        write()  # what is done stays, whatever comes
        run.close()
        if arguments.checkpoint is not None and not replayed and "wrong" not in row:
            runs.append((run, row["seconds"]["median"]))
        del run
        accelerator.free_memory()  # it keeps what it wrapped
    if arguments.checkpoint is not None:
        (first, usual), *others = runs
        result["checkpoint"] = save_and_read_back(
            first, arguments.checkpoint, [other for other, _ in others], usual
        )
        write()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        fail(str(error))
