"""Shares of a step's time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from mamba2lm.training.metrics import read_metrics
from mamba2lm.training.profile import covered, profile_step
from tests.training.helpers import make_trainer, recall_corpus


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0),
        ([(3, 5)], 2),
        ([(4, 6), (0, 1), (5, 9)], 6),
        ([(0, 10), (2, 3), (10, 11)], 11),
    ],
)
def test_overlapping_spans_count_once(spans: list[tuple[int, int]], length: int) -> None:
    assert covered(spans) == length


def test_one_process_communicates_with_nobody(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", recall_corpus(), max_steps=4, profile_every=3)
    assert trainer.fit()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("communication_fraction") for row in rows] == [None, None, 0.0, None]


@pytest.mark.gpu
def test_an_idle_gpu_is_seen_to_be_idle() -> None:
    x = torch.zeros(4096, 4096, device="cuda")
    shares = []
    for pause in (0.0, 0.2):
        with profile_step(torch.device("cuda")) as profile:
            for _ in range(20):
                x = x @ x
            torch.cuda.synchronize()
            time.sleep(pause)
            x = x @ x
        assert profile.communication == profile.exposed == 0.0
        assert sum(launches for _, launches in profile.kernels.values()) >= 21
        shares.append(profile.idle)
    assert shares[0] < 0.5 < shares[1]
