"""A hundred deterministic steps, whose losses a refactor has to reproduce.

After a change that is meant to alter them, write them anew with
``python -m tests.training.test_loss_curve`` and say why in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mamba2lm.data import DataConfig, TokenizerConfig, TokenizerKind, prepare_data
from mamba2lm.training.metrics import read_metrics
from tests.training.helpers import make_trainer, tiny_model

RECORDED = Path(__file__).parent / "data" / "loss_100_steps.json"


def losses(folder: Path) -> list[float]:
    """Train every mixer at once on the carried corpus, one thread, float32."""
    torch.set_num_threads(1)
    corpus = prepare_data(
        DataConfig(
            sources=["austen"],
            tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
            sequence_length=100,  # the last chunk of 16 is a part of one
        ),
        seed=0,
    )
    model = tiny_model("MSAF", d_model=48, n_layers=4)
    make_trainer(folder / "run", corpus, model, max_steps=100, micro_batch_size=2).fit()
    return [row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl")]


def test_a_hundred_steps_give_the_recorded_losses(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["losses"]
    assert len(recorded) == 100
    assert recorded[-1] < recorded[0] - 2
    # Not bit for bit: matrix libraries sum in another order on other processors.
    assert losses(tmp_path) == pytest.approx(recorded, rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        curve = losses(Path(scratch))
    record = {
        "what": "training loss of 100 steps, nats per token; see test_loss_curve.py",
        "regenerate": "python -m tests.training.test_loss_curve",
        "losses": [round(loss, 6) for loss in curve],
    }
    RECORDED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RECORDED}: {curve[0]:.4f} to {curve[-1]:.4f}\n")
