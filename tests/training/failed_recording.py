"""A run on a GPU whose recording fails for what nobody could foresee goes on launch by launch.

    python -m tests.training.failed_recording FOLDER

fails unless its weights are those of a run that was never to be recorded, with random numbers drawn
and memory taken and given back after the failure.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from mamba2lm.training.precision import Precision
from tests.training.helpers import make_trainer
from tests.training.test_graph import corpus, wide_model
from tests.training.test_resume import assert_same_checkpoint, step_folder


def spoil_recording(*_: Any) -> None:
    """Wait for the device where no operation of PyTorch shows it."""
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def run(folder: Path, name: str, *, cuda_graph: bool | None) -> Path:
    """Train with accumulation, dropout, validation."""
    model = wide_model("MAF")
    model.blocks[2].register_forward_hook(spoil_recording)
    trainer = make_trainer(
        folder / name, corpus(folder), model, cpu=False, cuda_graph=cuda_graph, max_steps=8,
        micro_batch_size=2, dropout=0.2, precision=Precision.bf16, eval_every=3, eval_batches=2,
    )  # fmt: skip
    assert trainer.fit()
    return step_folder(folder / name, 8)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    folder = Path(sys.argv[1])
    whole = run(folder, "launched", cuda_graph=False)
    assert_same_checkpoint(run(folder, "lenient", cuda_graph=None), whole)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
