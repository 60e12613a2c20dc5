"""Runs under torchrun: layouts of a small model against one process, in float64.

    torchrun --nproc-per-node N -m tests.distributed.exactness FILE [--slow]

writes a JSON object: case → largest differences over three steps.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2lm.distributed import Mesh, ParallelConfig
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.lora import LoRAConfig, add_lora
from mamba2lm.training.optimizer import OptimizerConfig, OptimizerKind, Optimizers
from mamba2lm.training.parallelize import ParallelModel, to_local
from tests.distributed.mixers import run_mixers
from tests.models.small import small_config

VOCAB, ROWS, LENGTH, STEPS, MAX_NORM = 50, 4, 32, 3, 0.3


@dataclass
class Case:
    """A layout of a model."""

    processes: int
    pattern: str
    parallel: dict[str, Any]
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: bool = False
    micro_steps: int = 1
    recompute: bool = False
    tie: bool = True
    lora: bool = False
    optimizer: OptimizerKind = OptimizerKind.adamw
    slow: bool = False


def groups(n: int) -> dict[str, dict[str, Any]]:
    return {"M": {"ngroups": n}}


BIASES = {
    "M": {"bias": True, "ngroups": 1},
    "S": {"bias": True},
    "A": {"bias": True, "n_heads": 4, "n_kv_heads": 1, "d_conv": 3},
    "F": {"bias": True},
}
KV1, KV2 = ({"A": {"n_heads": 4, "n_kv_heads": n}} for n in (1, 2))
WINDOW = {"A": {"n_heads": 4, "n_kv_heads": 2, "window": 5, "d_conv": 2}}
THREE = {"M": {"headdim": 8, "expand": 1.5, "ngroups": 3}}  # 6 heads

CASES = {
    "tp2 G=1": Case(2, "MM", {"tensor": 2}, groups(1)),
    "tp2 G=2": Case(2, "MM", {"tensor": 2}, groups(2)),
    "tp2 G=4": Case(2, "MM", {"tensor": 2}, groups(4), documents=True),
    "tp2 G=3, groups across processes": Case(2, "M", {"tensor": 2}, THREE),
    "tp2 mamba1": Case(2, "SS", {"tensor": 2}),
    "tp2 attention, one kv head": Case(2, "AF", {"tensor": 2}, KV1),
    "tp2 every mixer, biases, untied": Case(2, "MSAF", {"tensor": 2}, BIASES, True, 2, tie=False),
    "tp2 sequence parallel": Case(
        2, "MSAF", {"tensor": 2, "sequence_parallel": True}, recompute=True
    ),
    "dp2": Case(2, "MA", {}, micro_steps=2),
    "fsdp2": Case(2, "MSAF", {"data_shard": 2}, micro_steps=2, recompute=True),
    "fsdp2 gathered once": Case(
        2, "MSAF", {"data_shard": 2, "keep_gathered": True}, micro_steps=2, recompute=True
    ),
    "fsdp2 lora": Case(2, "MSAF", {"data_shard": 2}, lora=True),
    "cp2 lora": Case(2, "MS", {"context": 2}, documents=True, lora=True),
    "tp2 muon": Case(2, "MSAF", {"tensor": 2}, groups(1), optimizer=OptimizerKind.muon),
    "fsdp2 muon": Case(2, "MSAF", {"data_shard": 2}, optimizer=OptimizerKind.muon),
    "cp2 one document": Case(2, "MSAF", {"context": 2}),
    "cp2 documents": Case(2, "MSAF", {"context": 2}, documents=True, micro_steps=2),
    "cp2 window, convolution": Case(2, "A", {"context": 2}, WINDOW, True),
    "tp4 G=1": Case(4, "M", {"tensor": 4}, groups(1)),
    "tp4 G=2": Case(4, "M", {"tensor": 4}, groups(2)),
    "tp4 G=4": Case(4, "M", {"tensor": 4}, groups(4)),
    "tp4 mamba1, two kv heads": Case(4, "SAF", {"tensor": 4}, KV2),
    "tp4 sequence parallel G=1": Case(
        4, "MA", {"tensor": 4, "sequence_parallel": True}, groups(1) | KV1
    ),
    "cp4 documents": Case(4, "MSA", {"context": 4}, documents=True),
    "cp4 one document": Case(4, "MA", {"context": 4}, WINDOW),
    "dp2 tp2": Case(4, "MSAF", {"tensor": 2, "data_replicate": 2}, micro_steps=2),
    "fsdp2 tp2": Case(4, "MSAF", {"tensor": 2, "data_shard": 2}, groups(1), True, 2),
    "fsdp2 tp2 muon": Case(4, "MF", {"tensor": 2, "data_shard": 2}, optimizer=OptimizerKind.muon),
    "fsdp2 tp2 gathered once": Case(
        4, "MA", {"tensor": 2, "data_shard": 2, "keep_gathered": True}, KV2, micro_steps=2
    ),
    "dp2 fsdp2": Case(4, "MF", {"data_shard": 2, "data_replicate": 2}),
    "cp2 tp2, sequence parallel": Case(
        4, "MSAF", {"tensor": 2, "context": 2, "sequence_parallel": True}, KV1, True
    ),
    "fsdp2 tp2 cp2": Case(
        8, "MSAF", {"tensor": 2, "context": 2, "data_shard": 2}, KV1, True, slow=True
    ),
    "dp2 tp2 cp2": Case(8, "MSAF", {"tensor": 2, "context": 2}, documents=True, slow=True),
    "tp8 G=2": Case(8, "MF", {"tensor": 8}, groups(2), slow=True),
    "cp8": Case(8, "MSA", {"context": 8}, documents=True, slow=True),
}


def config_of(case: Case) -> ModelConfig:
    config = small_config(case.pattern, vocab_size=VOCAB, tie_embeddings=case.tie)
    config.mixers["M"].update(headdim=8)  # 8 heads
    for letter, fields in case.mixers.items():
        config.mixers[letter].update(fields)
    config.validate()
    return config


def model_of(case: Case) -> LanguageModel:
    model = LanguageModel(config_of(case))
    model.init_weights(0)
    if case.lora:
        add_lora(model, LoRAConfig(rank=3))
    generator = torch.Generator().manual_seed(5)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero, nothing is one
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.activation_checkpointing = case.recompute
    return model


def batch_of(step: int, documents: bool) -> dict[str, Tensor]:
    """Return a whole step: rows whose documents end within stretches and where stretches meet."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
    batch["labels"][1, 3:9] = -100
    if documents:
        starts = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        for row, places in enumerate([[5, 16], [8, 9, 24], [], [16, 17, 18, 30]]):
            starts[row, places] = 1
        batch["seq_idx"] = starts.cumsum(dim=1)
    return batch


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(
        batch["input_ids"], batch["labels"], seq_idx=batch.get("seq_idx"), loss_reduction="sum"
    ).loss


def difference(ours: Tensor, whole: Tensor) -> float:
    return (ours - whole).abs().max().item() if ours.numel() else 0.0


def run(case: Case) -> dict[str, float]:
    """Train three steps both ways; return the largest differences on this process."""
    accelerator = Accelerator(cpu=True)
    mesh = Mesh(
        ParallelConfig(**case.parallel),
        rank=dist.get_rank(),
        processes=dist.get_world_size(),
        device=torch.device("cpu"),
    )
    alone = model_of(case)
    parallel = ParallelModel(
        copy.deepcopy(alone), mesh, accelerator, activation_checkpointing=case.recompute
    )
    settings = OptimizerConfig(case.optimizer, learning_rate=1e-2, eps=1e-6)
    theirs, ours = Optimizers(settings, alone), Optimizers(settings, parallel.model)
    worst = dict.fromkeys(("loss", "norm", "gradients", "parameters"), 0.0)

    def compare(kind: str, whole: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
        for name, tensor in mine.items():
            if parallel.layout is None:
                worst[kind] = max(worst[kind], difference(tensor, whole[name]))
                continue
            covered = 0
            for piece in parallel.layout.pieces(name):
                local, box = tensor, whole[name]
                for axis, ((here, n), there) in enumerate(
                    zip(piece.local, piece.start, strict=True)
                ):
                    local, box = local.narrow(axis, here, n), box.narrow(axis, there, n)
                worst[kind] = max(worst[kind], difference(local, box))
                covered += local.numel()
            assert covered == tensor.numel(), name

    for step in range(STEPS):
        batch = batch_of(step, case.documents)
        count = int((batch["labels"] != -100).sum())
        whole_loss = loss_sum(alone, batch)
        (whole_loss / count).backward()

        rows = ROWS // mesh.data_size // case.micro_steps
        total = torch.zeros((), dtype=torch.float64)
        averaged = mesh.degrees.processes // mesh.copies
        for k in range(case.micro_steps):
            first = (k * mesh.data_size + mesh.data_rank) * rows
            part = {name: t[first : first + rows] for name, t in batch.items()}
            if mesh.context is not None:
                part = {name: mesh.context.stretch(t) for name, t in part.items()}
            with parallel.micro_batch(last=k == case.micro_steps - 1):
                loss = loss_sum(parallel.call, part)
                (loss * (averaged / count)).backward()
            total += loss.detach()
        parallel.finish_gradients()
        dist.all_reduce(total)
        worst["loss"] = max(
            worst["loss"], difference(total / mesh.copies / count, whole_loss.detach() / count)
        )
        frozen = {name for name, p in alone.named_parameters() if p.grad is None}
        assert {name for name, p in parallel.model.named_parameters() if p.grad is None} == frozen
        compare(
            "gradients",
            {name: p.grad for name, p in alone.named_parameters() if p.grad is not None},
            {
                n: to_local(p.grad)
                for n, p in parallel.model.named_parameters()
                if p.grad is not None
            },
        )
        whole_norm = nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM)
        assert whole_norm > MAX_NORM
        norm = parallel.gradient_norm()
        ours.clip(norm, MAX_NORM)
        worst["norm"] = max(worst["norm"], difference(norm, whole_norm))
        for optimizers in (theirs, ours):
            optimizers.step()
            optimizers.zero_grad()
    compare(
        "parameters",
        dict(alone.named_parameters()),
        {name: to_local(p.detach()) for name, p in parallel.model.named_parameters()},
    )
    worst["generation"] = generate_difference(alone, parallel, mesh)
    return worst


@torch.no_grad()
def generate_difference(alone: LanguageModel, parallel: ParallelModel, mesh: Mesh) -> float:
    """Read a prompt in two stretches, then single tokens; compare logits."""
    ids = batch_of(9, False)["input_ids"][:2, :13]
    worst = 0.0
    logits = []
    for model in (alone.eval(), parallel.model.eval()):
        state = model.new_state(2)
        seen = []
        for begin, end in ((0, 7), (7, 10)):
            out = model(ids[:, begin:end], state=state, last_only=True)
            state = out.state
            seen.append(out.logits[:, 0])
        for t in range(10, 13):
            step_logits, state = model.step(ids[:, t], state)
            seen.append(step_logits)
        logits.append(torch.stack(seen))
    worst = difference(*logits)
    if mesh.context is None:  # the whole sequence's logits and each label's loss
        batch = batch_of(8, True)
        given = {"seq_idx": batch["seq_idx"]}
        ours, theirs = (m(batch["input_ids"], **given).logits for m in (parallel.model, alone))
        worst = max(worst, difference(ours, theirs))
        nll = parallel.model(
            batch["input_ids"], batch["labels"], **given, loss_reduction="none"
        ).loss
        expected = F.cross_entropy(theirs.transpose(1, 2), batch["labels"], reduction="none")
        worst = max(worst, difference(nll, expected))
    return worst


class CountGathers(TorchDispatchMode):
    """Count collectives that gather into one tensor."""

    gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += func is torch.ops.c10d._allgather_base_.default
        return func(*args, **(kwargs or {}))


def gathers(case: Case) -> int:
    """Return how many times a step gathers weights."""
    mesh = Mesh(
        ParallelConfig(**case.parallel),
        rank=dist.get_rank(),
        processes=dist.get_world_size(),
        device=torch.device("cpu"),
    )
    parallel = ParallelModel(model_of(case), mesh, Accelerator(cpu=True))
    batch = batch_of(0, case.documents)
    with CountGathers() as counted:
        for i in range(case.micro_steps):
            with parallel.micro_batch(last=i == case.micro_steps - 1):
                loss_sum(parallel.call, batch).backward()
    return counted.gathers


def main() -> None:
    target, slow = Path(sys.argv[1]), "--slow" in sys.argv
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    size, results = dist.get_world_size(), {}
    if size == 2:
        for name, worst in run_mixers().items():
            values = torch.tensor(list(worst.values()), dtype=torch.float64)
            dist.all_reduce(values, dist.ReduceOp.MAX)
            results[name] = dict(zip(worst, values.tolist(), strict=True))
    for name, case in CASES.items():
        if case.processes != size or (case.slow and not slow):
            continue
        worst = run(case)
        values = torch.tensor(list(worst.values()), dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        results[name] = dict(zip(worst, values.tolist(), strict=True))
    if size == 2:
        results["gathers"] = {
            name: gathers(CASES[name]) for name in ("fsdp2", "fsdp2 gathered once")
        }
    if dist.get_rank() == 0:
        target.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
