"""The memory estimate against tensors that exist, and a report that writes nothing."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mamba2lm.training import dry_run
from mamba2lm.training.dry_run import estimate_memory, readable_bytes
from mamba2lm.training.precision import autocast
from tests.training.helpers import (
    run_here,
    text_corpus,
    text_file,
    tiny_config,
    tiny_model,
    tiny_run,
    tree,
)


def kept_bytes(
    pattern: str, dtype: torch.dtype, recompute: bool, folder: Path, **shape: int
) -> int:
    """Measure what autograd keeps of a real forward pass on real text, weights left out."""
    model = tiny_model(pattern, **shape)
    model.activation_checkpointing = recompute
    corpus = text_corpus(folder, sequence_length=128)
    samples = [corpus.train.sample(index) for index in range(4)]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(torch.device("cpu"), dtype),
    ):
        output = model(batch["input_ids"], batch["labels"], seq_idx=batch["seq_idx"])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    assert output.loss is not None
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in weights)


@pytest.mark.parametrize("pattern", ["M", "S", "A", "F", "MMMAF"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_near_what_autograd_keeps(
    tmp_path: Path, pattern: str, dtype: torch.dtype
) -> None:
    shape = {"d_model": 64}
    measured = kept_bytes(pattern, dtype, False, tmp_path, **shape)
    estimate = estimate_memory(
        tiny_config(pattern, **shape), micro_batch=4, length=128, dtype=dtype,
        activation_checkpointing=False,
    )  # fmt: skip
    assert estimate.activations == pytest.approx(measured, rel=0.25)


def test_the_estimate_follows_activation_checkpointing(tmp_path: Path) -> None:
    config = tiny_config("MF", d_model=64)
    estimates = [
        estimate_memory(config, micro_batch=4, length=128, dtype=torch.float32,
                        activation_checkpointing=recompute).activations
        for recompute in (False, True)
    ]  # fmt: skip
    measured = kept_bytes("MF", torch.float32, True, tmp_path, d_model=64)
    assert estimates[1] == pytest.approx(measured, rel=0.25)
    assert estimates[1] < 0.5 * estimates[0]


def test_weights_gradients_and_moments_are_counted_in_float32() -> None:
    model = tiny_model("MS")
    estimate = estimate_memory(
        tiny_config("MS"), micro_batch=1, length=16, dtype=torch.bfloat16,
        activation_checkpointing=False,
    )  # fmt: skip
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (size, size, 2 * size)
    assert estimate.total == 4 * size + estimate.activations


def test_bytes_are_written_with_a_unit() -> None:
    assert [readable_bytes(n) for n in (12, 2048, 5 * 2**20, 3.5 * 2**30)] == [
        "12 B", "2 KiB", "5 MiB", "3.50 GiB",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_a_dry_run_shows_its_figures_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = tree(tmp_path)
    assert run_here([*tiny_run(text, tmp_path / "run"), "dry_run=true"]) == 0
    assert tree(tmp_path) == before
    out = capsys.readouterr().out
    model = tiny_model("M", d_model=64)
    assert "d_model: 64" in out
    assert f"{model.parameter_count():,} (" in out
    flops = model.flops_per_token(128)
    assert f"{flops:.4g} forward, {3 * flops:.4g} trained" in out
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert f"{part} " in out
    [line] = [line for line in out.splitlines() if "one step" in line]
    loss = float(line.split("loss ")[1].split(",")[0])
    assert 5.3 < loss < 5.8  # log(257) = 5.55
    assert "tokens/s" in line


def test_a_dry_run_of_2_7b_allocates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "memory_available", lambda device: 8 * 2**30)
    text = text_file(tmp_path / "text")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = run_here(
        [
            "model=mamba2_2_7b", f"data.sources=[{text}]", f"run_dir={tmp_path / 'run'}",
            "data.tokenizer.vocab_size=300", "model.vocab_size=50277", "dry_run=true",
        ]
    )  # fmt: skip
    assert code == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB: 1 GiB
    out = capsys.readouterr().out
    assert "2,702,599,680 (" in out
    assert "weights 10.07 GiB, gradients 10.07 GiB, optimizer 20.14 GiB" in out
    assert "not run: the estimate is more than the memory free" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_does_not_start_a_step_of_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path / "text")
    monkeypatch.setattr(dry_run, "peak_flops", lambda device, dtype: 1e6)
    assert run_here([*tiny_run(text, tmp_path / "run"), "dry_run=true"]) == 0
    flops = 3 * tiny_model("M", d_model=64).flops_per_token(128)
    out = " ".join(capsys.readouterr().out.split())
    step = int(out.split("one step not run: it would take about ")[1].split(" minutes")[0])
    [sequences] = [int(part.split(" x ")[0]) for part in out.split(" step ")[1:2]]
    assert step == round(flops * sequences * 128 / (0.2 * 1e6) / 60)
    assert not (tmp_path / "run").exists()
