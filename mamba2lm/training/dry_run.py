"""What a run would be: parameters, FLOPs and memory, found without allocating it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba2lm.data.batches import training_batches
from mamba2lm.data.loader import Corpus
from mamba2lm.distributed import Degrees, ParallelConfig, World
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.hardware import memory_available, peak_flops, readable_bytes
from mamba2lm.training.optimizer import OptimizerConfig
from mamba2lm.training.precision import autocast, matmul_dtype
from mamba2lm.training.run_folder import RunFolder
from mamba2lm.training.schedule import ScheduleConfig
from mamba2lm.training.trainer import Trainer

LONGEST_STEP = 60.0
"""Seconds; a step expected to take longer is not run."""
USUAL_MFU = 0.2
"""Share of the device's peak that training reaches, roughly (measured on two CPU cores)."""


@dataclass
class MemoryEstimate:
    """Bytes a training step needs on each process."""

    weights: int
    """float32."""
    gradients: int
    """float32."""
    optimizer: int
    """Two float32 moments per parameter."""
    activations: int
    """Kept for the backward pass of one micro-batch."""

    @property
    def total(self) -> int:
        """Sum of the parts; temporary buffers and fragmentation come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def divided(self, degrees: Degrees) -> MemoryEstimate:
        """Return the estimate of one process of a layout.

        Weights, gradients and moments divide over all but replicas; activations over the processes
        that share heads or sequences (roughly: what lies between layers is whole under ``tensor``).
        """
        shards = degrees.data_shard * degrees.context * degrees.tensor
        parts = degrees.context * degrees.tensor
        return MemoryEstimate(
            self.weights // shards,
            self.gradients // shards,
            self.optimizer // shards,
            self.activations // parts,
        )


def estimate_memory(
    config: ModelConfig,
    *,
    micro_batch: int,
    length: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
) -> MemoryEstimate:
    """Estimate a training step's memory by running its forward pass on tensors without storage.

    Args:
        config: The model.
        micro_batch: Sequences per forward pass.
        length: Tokens per sequence.
        dtype: Dtype of the matrix products.
        activation_checkpointing: As in training.

    Returns:
        The parts in bytes. Activations are every distinct storage that autograd keeps, weights
        left out; a storage counts once however many tensors share it. Document boundaries are left
        out too: where they are is data, which tensors without storage do not have.
    """

    def kept_by(letters: str) -> int:
        smaller = dataclasses.replace(config, pattern=letters, n_layers=None)
        return _kept_for_backward(smaller, micro_batch, length, dtype, activation_checkpointing)

    # Sub-layers of the same letter keep the same: one of each is run, and one more of each.
    counts = Counter(config.letters)
    once = "".join(counts)
    activations = base = kept_by(once)
    for letter, count in counts.items():
        if count > 1:
            activations += (count - 1) * (kept_by(once + letter) - base)
    with torch.device("meta"):
        size = 4 * LanguageModel(config).parameter_count()
    return MemoryEstimate(size, size, 2 * size, activations)


def _kept_for_backward(
    config: ModelConfig,
    micro_batch: int,
    length: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
) -> int:
    kept: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode():
        model = LanguageModel(config)
        model.activation_checkpointing = activation_checkpointing
        ids = torch.zeros(micro_batch, length, dtype=torch.int64)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                # The tensor is held so that no later storage takes the same address.
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, _same),
            autocast(torch.device("cpu"), dtype),
        ):
            model(ids, ids)
        return sum(nbytes for nbytes, _ in kept.values())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def report_dry_run(
    resolved: dict[str, Any],
    model_config: ModelConfig,
    corpus: Corpus,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    accelerator: Accelerator,
) -> None:
    """Show on standard output what a run would be, and do one step of it, writing nothing.

    Args:
        resolved: The whole configuration, to show.
        model_config: The model, its vocabulary filled in.
        corpus: The data.
        training: The loop.
        optimizer: For the step.
        parallel: How the processes divide the work.
        accelerator: Device and processes.
    """
    device, length = accelerator.device, corpus.sequence_length
    dtype = matmul_dtype(training.precision, device)
    degrees = parallel.degrees(accelerator.num_processes)
    data_size = degrees.data_replicate * degrees.data_shard
    micro_batch, micro_steps = training.share_of(data_size)
    with torch.device("meta"):
        model = LanguageModel(model_config)
    memory = estimate_memory(
        model_config,
        micro_batch=micro_batch,
        length=length,
        dtype=dtype,
        activation_checkpointing=training.activation_checkpointing,
    ).divided(degrees)
    total, body = model.parameter_count(), model.parameter_count(embedding=False)
    forward = model.flops_per_token(length)
    tokens = training.max_steps * training.batch_size * length
    free = memory_available(device)
    shared = accelerator.num_processes // data_size
    facts = {
        "layers": f"{len(model_config.letters)}: {model_config.pattern}"
        f" x {len(model_config.letters) // len(model_config.pattern)}",
        "parameters": f"{total:,} ({body:,} without embedding)",
        "FLOPs per token": f"{forward:.4g} forward, {3 * forward:.4g} trained",
        "data": ", ".join(f"{k} {v}" for k, v in corpus.train.describe().items()),
        "run": f"{training.max_steps:,} steps, {tokens:,} tokens, "
        f"{tokens / corpus.train.tokens:.2f} epochs, {3 * forward * tokens:.3g} FLOPs",
        "step": f"{training.batch_size} x {length} tokens: {data_size} process(es) "
        f"x {micro_steps} x {micro_batch} sequences, {str(dtype).removeprefix('torch.')}"
        + (f"; {shared} processes share each sample" if shared > 1 else ""),
        "memory": f"{readable_bytes(memory.total)} a process: "
        f"weights {readable_bytes(memory.weights)}, gradients {readable_bytes(memory.gradients)}, "
        f"optimizer {readable_bytes(memory.optimizer)}, "
        f"activations {readable_bytes(memory.activations)}; {readable_bytes(free)} free",
    }
    world = World(accelerator.process_index, accelerator.num_processes, device)
    seconds = _expected_seconds(3 * forward * micro_batch * micro_steps * length, device, dtype)
    if world.any(memory.total > 0.9 * free):
        facts["one step"] = "not run: the estimate is more than the memory free"
    elif world.any(seconds > LONGEST_STEP):
        facts["one step"] = (
            f"not run: it would take about {seconds / 60:,.0f} minutes here; "
            "a smaller training.batch_size would show one"
        )
    else:
        facts["one step"] = _one_step(
            model_config, corpus, training, optimizer, parallel, accelerator
        )
    if accelerator.is_main_process:
        sys.stdout.write(OmegaConf.to_yaml(resolved) + "\n")
        table = Table(show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        for name, fact in facts.items():
            table.add_row(name, fact)
        Console().print(table)


def _expected_seconds(flops: float, device: torch.device, dtype: torch.dtype) -> float:
    """Guess how long a step takes, from its FLOPs and what the device does at best."""
    return flops / (USUAL_MFU * peak_flops(device, dtype))


def _one_step(
    model_config: ModelConfig,
    corpus: Corpus,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    accelerator: Accelerator,
) -> str:
    model = LanguageModel(model_config)
    model.init_weights(training.seed)
    trainer = Trainer(
        model,
        corpus,
        config=training,
        optimizer=optimizer,
        schedule=ScheduleConfig(),
        run=RunFolder(Path()),  # never written to: only fit() does
        accelerator=accelerator,
        parallel=parallel,
    )
    batches = training_batches(
        corpus.train,
        start=0,
        micro_batch=trainer.micro_batch,
        rank=trainer.mesh.data_rank,
        world_size=trainer.mesh.data_size,
    )
    begin = time.perf_counter()
    gradient = trainer.forward_backward([next(batches) for _ in range(trainer.micro_steps)])
    trainer.optimizers.step()
    speed = training.batch_size * corpus.sequence_length / (time.perf_counter() - begin)
    return (
        f"loss {gradient.loss:.4f}, gradient norm {gradient.norm:.2f}, "
        f"{speed:,.0f} tokens/s (the first step is slower than the rest)"
    )
