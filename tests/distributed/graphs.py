"""Runs on two processes of one tensor group: steps replayed against steps launched.

    torchrun --nproc-per-node 2 -m tests.distributed.graphs FOLDER

writes ``results.json`` in the folder. With two GPUs they record CUDA graphs; on the CPU a stand-in
does as these do.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from mamba2lm.distributed import ParallelConfig
from mamba2lm.models import LanguageModel
from mamba2lm.training.graph import WARM_UP
from mamba2lm.training.trainer import Trainer
from tests.distributed.training import local_values
from tests.training.helpers import make_trainer, text_corpus, tiny_config
from tests.training.recording import stand_ins

STEPS = 7


def train(folder: Path, name: str, *, over_sequence: bool, record: bool, cpu: bool) -> Trainer:
    """Train with accumulation, every process its part of each layer."""
    config = tiny_config("MSAF", d_model=64)
    config.mixers["M"] |= {"headdim": 32, "d_state": 32}  # which the kernels take
    model = LanguageModel(config)
    model.init_weights(0)
    trainer = make_trainer(
        folder / name,
        text_corpus(folder),
        model,
        parallel=ParallelConfig(tensor=2, sequence_parallel=over_sequence),
        max_steps=STEPS,
        micro_batch_size=2,
        eval_every=3,
        eval_batches=2,
        cpu=cpu,
        cuda_graph=record and not cpu,
    )
    assert trainer.fit()
    return trainer


def replays_as_launched(folder: Path, *, over_sequence: bool, cpu: bool) -> bool:
    """Return whether weights and moments are the same bit for bit, on this process."""
    name = "split" if over_sequence else "whole"
    launched = train(folder, f"{name} a", over_sequence=over_sequence, record=False, cpu=cpu)
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch) if cpu else []
        replayed = train(folder, f"{name} b", over_sequence=over_sequence, record=True, cpu=cpu)
    assert [each.replayed for each in made] == ([(STEPS - WARM_UP) * 2] if cpu else [])
    ours, theirs = local_values(replayed), local_values(launched)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    cpu = torch.cuda.device_count() < 2
    device = Accelerator(cpu=cpu).device
    if dist.get_rank() == 0:
        text_corpus(folder)
    dist.barrier()
    found = [replays_as_launched(folder, over_sequence=split, cpu=cpu) for split in (False, True)]
    values = torch.tensor(found, dtype=torch.float32, device=device)
    dist.all_reduce(values, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        whole, split = (values > 0).tolist()
        results = {"device": device.type, "whole sequences": whole, "split sequences": split}
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
