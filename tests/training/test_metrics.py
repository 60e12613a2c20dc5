"""Rows written, cut back and drawn; and what the device is said to do."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch

from mamba2lm.training import hardware
from mamba2lm.training.metrics import (
    Metrics,
    describe,
    plot_losses,
    read_metrics,
    truncate_metrics,
    truncate_samples,
)
from tests.training.helpers import Rows

TRAINING = {
    "step": 3, "tokens": 1536, "loss": 5.25, "grad_norm": 0.5, "learning_rate": 0.001,
    "tokens_per_second": 12345.6, "mfu": 0.25,
}  # fmt: skip
HELD_OUT = {"step": 3, "tokens": 1536, "val_loss": 2.0, "val_perplexity": math.exp(2.0)}


def test_rows_are_lines_of_json_and_reach_the_tracker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Rows()
    metrics = Metrics(tmp_path / "metrics.jsonl", max_steps=10, tracker=tracker)
    with caplog.at_level(logging.INFO):
        metrics.write(TRAINING)
        metrics.write({**TRAINING, "step": 4, "loss": math.nan, "grad_norm": math.inf})
        metrics.write({**HELD_OUT, "val_bits_per_byte": 1.5})
    # Flushed row by row, so that a kill loses none.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    metrics.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == TRAINING
    assert rows[1]["loss"] is None
    assert rows[1]["grad_norm"] is None
    assert rows[2]["val_bits_per_byte"] == 1.5
    assert [row["step"] for row in tracker.rows] == [3, 4, 3]
    assert tracker.finished
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "step 3/10  loss 5.2500  grad 0.50  lr 1.00e-03  12,346 tok/s  MFU 25%"
    assert lines[2] == "step 3/10  held-out loss 2.0000  perplexity 7.39  bits per byte 1.500"


def test_a_description_leaves_out_what_is_not_there() -> None:
    assert describe(HELD_OUT) == "held-out loss 2.0000  perplexity 7.39"
    row = {name: value for name, value in TRAINING.items() if name != "mfu"}
    assert describe(row).endswith("12,346 tok/s")


def test_rows_are_appended_to_those_there(tmp_path: Path) -> None:
    for step in (1, 2):
        metrics = Metrics(tmp_path / "metrics.jsonl", max_steps=10)
        metrics.write({**TRAINING, "step": step})
        metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_truncation_keeps_rows_up_to_the_step_and_drops_a_cut_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]
    rows.insert(2, {"step": 2, "val_loss": 0.25})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3, 4]
    assert "unreadable line" in caplog.text
    truncate_metrics(path, 2)
    assert read_metrics(path) == rows[:3]
    truncate_metrics(path, 2)
    assert read_metrics(path) == rows[:3]
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_of_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    truncate_samples(tmp_path / "samples.txt", 3)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_cut_at_the_first_heading_past_the_step(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_text("=== step 5\none\n\n=== step 10\n= step 99 in text\n\n=== step 20\nthree\n\n")
    truncate_samples(path, 10)
    assert path.read_text() == "=== step 5\none\n\n=== step 10\n= step 99 in text\n\n"
    truncate_samples(path, 4)
    assert path.read_text() == ""


def test_the_plot_is_a_picture_even_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    plot_losses(path, tmp_path / "empty.png")
    rows = [{"step": s, "tokens": 10 * s, "loss": 3 / s, "val_loss": None} for s in range(1, 30)]
    rows += [{"step": 29, "tokens": 290, "val_loss": 0.5, "val_bits_per_byte": 1.25}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(path, tmp_path / "loss.png")
    empty, drawn = ((tmp_path / name).read_bytes() for name in ("empty.png", "loss.png"))
    assert empty[:8] == drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(drawn) > len(empty) + 2000


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307),
    ],
)  # fmt: skip
def test_known_devices_have_their_data_sheet_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == teraflops * 1e12


def test_unknown_devices_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Something New")
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 42.0)
    assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == 42.0
    assert hardware.peak_flops(torch.device("cpu"), torch.float32) == 42.0


def test_measured_flops_are_those_of_a_product_timed_here() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    measured = hardware.measured_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "measuring drew from the run's random numbers"
    a = torch.randn(512, 512)
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    assert 0.1 < measured / (2 * 512**3 / best) < 10


def test_memory_figures_are_of_this_process_and_machine() -> None:
    cpu = torch.device("cpu")
    before = hardware.memory_in_use(cpu)
    assert 2**26 < before < 2**40
    kept = torch.ones(before // 4 + 2**26, dtype=torch.float32)  # more than ever before
    assert hardware.memory_in_use(cpu) - before > 2**27
    assert hardware.memory_available(cpu) > 2**20
    del kept
