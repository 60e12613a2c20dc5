"""Runs under torchrun with 4 processes: a run saved by one layout goes on in others.

    torchrun --nproc-per-node 4 -m tests.distributed.training FOLDER

writes runs below FOLDER and ``results.json`` in it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mamba2lm.distributed import ParallelConfig
from mamba2lm.training.checkpoint import SaveError
from mamba2lm.training.faults import NonFiniteError
from mamba2lm.training.profile import profile_step
from mamba2lm.training.trainer import Trainer
from tests.distributed.full_disk import simulated
from tests.training.helpers import make_trainer, text_corpus, tiny_model

LAYOUTS = {
    "fsdp2 tp2": ParallelConfig(tensor=2, data_shard=2),
    "fsdp4": ParallelConfig(data_shard=4),
    "cp2 tp2": ParallelConfig(tensor=2, context=2, sequence_parallel=True),
    "dp4": ParallelConfig(),
}
SETTINGS: dict[str, Any] = {
    "batch_size": 8, "save_every": 3, "eval_every": 3, "eval_batches": 2, "keep_last": 4,
}  # fmt: skip


def build(folder: Path, run: str, layout: str, **changes: Any) -> Trainer:
    """Build a trainer; initial weights other than those saved unless ``seed`` is 0."""
    corpus = text_corpus(folder)
    trainer = make_trainer(
        folder / run,
        corpus,
        tiny_model("MSAF", seed=changes.pop("seed", 1)),
        parallel=LAYOUTS[layout],
        write_sample=lambda model: repr(model.new_state(1).nbytes),
        **{**SETTINGS, **changes},
    )
    return trainer


def saved(folder: Path) -> str:
    """Return the checkpoint that the first run leaves half way."""
    return str(folder / "whole" / "checkpoints" / "step_00000003")


def local_values(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return this process's weights and moments."""
    trainer.parallel.reshard()
    tensors = {name: p.detach() for name, p in trainer.model.named_parameters()}
    tensors |= {f"{name}::{key}": t for name, key, t in trainer.optimizers.tensors()}
    return {name: getattr(t, "_local_tensor", t).clone() for name, t in tensors.items()}


def resume_in_the_same_layout(folder: Path) -> dict[str, bool]:
    """Six steps at once, and the last three again; the results are equal bit for bit."""
    whole = build(folder, "whole", "fsdp2 tp2", max_steps=6, seed=0)
    assert whole.fit()
    parts = build(folder, "parts", "fsdp2 tp2", max_steps=6, resume=saved(folder), seed=2)
    assert parts.progress.step == 3
    assert parts.fit()
    ours, theirs = local_values(parts), local_values(whole)
    return {"same layout": all(torch.equal(ours[name], theirs[name]) for name in theirs)}


def resume_in_others(folder: Path) -> dict[str, bool]:
    """Go on in every layout with what one saved."""
    for layout in LAYOUTS:
        run = f"in {layout}"
        trainer = build(folder, run, layout, max_steps=6, resume=saved(folder), profile_every=2)
        assert trainer.progress.step == 3
        assert trainer.progress.samples == 24
        assert trainer.fit()
    return {}


def poisoned_process(folder: Path) -> dict[str, bool]:
    """A loss that is not finite on one process skips the step on all, and ends the run on all."""
    trainer = build(folder, "poisoned", "fsdp2 tp2", max_steps=9, max_bad_steps=2)
    calls = 0

    def poison(module: Any, given: Any, result: Any) -> Any:
        nonlocal calls
        calls += 1
        bad = dist.get_rank() == 3 and calls in (2, 4, 5)
        return result._replace(loss=result.loss * math.nan) if bad and module.training else result

    trainer.model.register_forward_hook(poison)
    trainer.config.eval_every = 0
    before = local_values(trainer)
    try:
        trainer.fit()
    except NonFiniteError:
        ended = trainer.progress.step
    else:
        ended = -1
    finite = all(t.isfinite().all().item() for t in local_values(trainer).values())
    changed = any(
        not torch.equal(t, before[n]) for n, t in local_values(trainer).items() if n in before
    )
    return {"ended at step 5": ended == 4, "weights stay finite": finite, "learned": changed}


def failing_save(folder: Path) -> dict[str, bool]:
    """A disk that is full for one process: all hear of it, and the earlier checkpoint stays."""
    trainer = build(folder, "full", "fsdp2 tp2", max_steps=3)
    trainer.fit()
    before = sorted(p.name for p in (folder / "full" / "checkpoints").iterdir())
    dist.barrier()
    trainer.progress.step = 4

    try:
        with simulated(only=dist.get_rank() == 2):
            trainer.checkpoints.save(trainer.progress)
            trainer.checkpoints.finish()
    except SaveError:
        failed = True
    else:
        failed = False
    dist.barrier()
    after = sorted(p.name for p in (folder / "full" / "checkpoints").iterdir())
    dist.barrier()
    trainer.checkpoints.save(trainer.progress)
    trainer.checkpoints.finish()
    return {"failure is everybody's": failed, "earlier checkpoint stays": before == after}


def waiting_is_communication(folder: Path) -> dict[str, bool]:
    """Of processes that wait in a collective for another, a profile shows it."""
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), 4
    with profile_step(torch.device("cpu")) as profile:
        if rank == 0:
            store.wait([f"there/{other}" for other in range(1, size)])
            time.sleep(0.3)
        else:
            store.set(f"there/{rank}", "")
        dist.all_reduce(torch.ones(4))
    return {"waiting shows": rank == 0 or 0.5 < profile.communication <= 1.0}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    Accelerator(cpu=True)
    if dist.get_rank() == 0:
        text_corpus(folder)
    dist.barrier()
    results: dict[str, bool] = {}
    for scenario in (
        resume_in_the_same_layout, resume_in_others, poisoned_process, failing_save,
        waiting_is_communication,
    ):  # fmt: skip
        results |= scenario(folder)
    values = torch.tensor([float(value) for value in results.values()])
    dist.all_reduce(values, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        text = json.dumps(dict(zip(results, (values > 0).tolist(), strict=True)))
        (folder / "results.json").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
