"""States carried over steps: rows that read on, losses of the whole text, runs that can stop."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.data import Corpus, DataConfig, DataKind, TokenizerConfig, TokenizerKind, prepare_data
from mamba2lm.data.sampler import StreamOrder
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError
from mamba2lm.training.carry import by_name
from mamba2lm.training.metrics import read_metrics
from mamba2lm.training.objective import Gradient
from mamba2lm.training.optimizer import OptimizerConfig
from mamba2lm.training.trainer import Trainer
from tests.training.helpers import (
    documents_file,
    finish,
    make_trainer,
    start,
    text_file,
    tiny_model,
    tiny_run,
)
from tests.training.test_resume import assert_same_checkpoint, sigterm_at, step_folder

ROWS = 4


def corpus(folder: Path, *, reset: bool = True, streams: int | None = ROWS) -> Corpus:
    """Return prose in documents of unequal length, as bytes, in windows of 32."""
    # Some documents begin with a window, some within one, some span many.
    file = documents_file(folder, (*(95, 63, 159) * 6, 700, 90, 33, 1200))
    config = DataConfig(
        sources=[str(file)],
        tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        sequence_length=32,
        reset_at_documents=reset,
        cache_dir=str(folder / "cache"),
    )
    return prepare_data(config, seed=0, streams=streams)


def build(folder: Path, name: str, pattern: str = "M", **settings: Any) -> Trainer:
    data = corpus(folder, reset=settings.pop("reset", True))
    model = settings.pop("model", None) or tiny_model(pattern)
    values = {"batch_size": ROWS, "carry_state": True, "max_steps": 6, **settings}
    return make_trainer(folder / name, data, model, **values)


def test_rows_go_on_where_they_stopped_and_share_the_text() -> None:
    order = StreamOrder(3, [3.0, 1.0], [40, 7], 8)
    steps = [[order.window(step * 8 + row) for row in range(8)] for step in range(20)]
    sources = [source for source, _ in steps[0]]
    assert (sources.count(0), sources.count(1)) == (6, 2)
    for before, after in itertools.pairwise(steps):
        for (source, window), (same, following) in zip(before, after, strict=True):
            assert same == source
            assert following == (window + 1) % (40, 7)[source]
    read = sorted(window for step in steps[:6] for source, window in step if source == 0)
    assert len(set(read)) == 36  # six rows of 40 windows, not one of them twice
    other = StreamOrder(4, [3.0, 1.0], [40, 7], 8)
    assert [other.window(row) for row in range(8)] != steps[0]


@pytest.mark.parametrize("rows", range(3, 12))
def test_every_source_has_a_row(rows: int) -> None:
    order = StreamOrder(0, [100.0, 1.0, 1.0], [50, 50, 50], rows)
    counts = [sum(order.window(row)[0] == source for row in range(rows)) for source in range(3)]
    assert sum(counts) == rows
    assert min(counts) == 1


@torch.no_grad()
def losses_by_hand(model: LanguageModel, data: Corpus, steps: int) -> list[float]:
    """Read each row's text whole, document by document, and average each step's part."""
    total = torch.zeros(steps, dtype=torch.float64)
    for row in range(ROWS):
        samples = [data.train.sample(step * ROWS + row) for step in range(steps)]
        fresh: list[Tensor] = []
        for sample in samples:
            first = sample.get("seq_idx", torch.zeros(32, dtype=torch.int32)).diff() != 0
            fresh.append(F.pad(first, (1, 0)))
            fresh[-1][0] = not sample["continues"]
        document = torch.cat(fresh).cumsum(0)
        ids = torch.cat([sample["input_ids"] for sample in samples])
        labels = torch.cat([sample["labels"] for sample in samples])
        for number in document.unique():
            mine = document == number
            logits = model(ids[mine][None]).logits[0]
            loss = F.cross_entropy(logits, labels[mine], reduction="none").double()
            total.index_add_(0, torch.arange(32 * steps)[mine] // 32, loss)
    return (total / (32 * ROWS)).tolist()


@pytest.mark.parametrize(
    ("pattern", "reset", "micro"), [("M", True, 4), ("S", True, 2), ("M", False, 1)]
)
def test_each_step_continues_the_text(
    tmp_path: Path, pattern: str, reset: bool, micro: int
) -> None:
    trainer = build(
        tmp_path, "run", pattern, reset=reset, micro_batch_size=micro, max_steps=12,
        optimizer=OptimizerConfig(learning_rate=1e-30, weight_decay=0.0),
    )  # fmt: skip
    data = trainer.corpus
    samples = [data.train.sample(i) for i in range(12 * ROWS)]
    begins = sum(not sample["continues"] for sample in samples)
    assert begins > 0 if reset else begins <= 1
    expected = losses_by_hand(trainer.model, data, 12)
    trainer.fit()
    found = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert found == pytest.approx(expected, rel=2e-5)
    # The state matters: without it the same windows cost more or less.
    with torch.no_grad():
        alone = [
            float(
                trainer.model(
                    torch.stack([s["input_ids"] for s in samples[k * ROWS : (k + 1) * ROWS]]),
                    torch.stack([s["labels"] for s in samples[k * ROWS : (k + 1) * ROWS]]),
                ).loss
            )
            for k in range(12)
        ]
    assert max(abs(a - b) for a, b in zip(alone, found, strict=True)) > 1e-3


def test_no_gradient_crosses_a_step(tmp_path: Path) -> None:
    trainer = build(tmp_path, "run", micro_batch_size=2)
    trainer.fit()
    assert trainer.carried is not None
    for micro_step in range(2):
        state = trainer.carried.before(micro_step, 2)
        assert not any(tensor.requires_grad for tensor in state.values())
        assert any(tensor.abs().max() > 0 for tensor in state.values())
        mixed = by_name(trainer.carried.begin(state, torch.tensor([True, False])))
        for name, tensor in mixed.items():
            assert tensor[0].equal(state[name][0])
            assert tensor[1].abs().max() == 0


def test_a_stopped_run_goes_on_with_its_states(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "micro_batch_size": 2}
    assert build(tmp_path, "whole", **settings).fit()
    assert build(tmp_path, "parts", **settings, tracker=sigterm_at(3)).fit() is False
    assert build(tmp_path, "parts", **settings, model=tiny_model("M", seed=5)).fit()
    for name in ("whole", "parts"):
        assert (step_folder(tmp_path / name, 8) / "carried.safetensors").is_file()
    assert_same_checkpoint(step_folder(tmp_path / "whole", 8), step_folder(tmp_path / "parts", 8))


def test_other_batches_begin_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path, "run", max_steps=2).fit()
    again = build(tmp_path, "run", max_steps=4, micro_batch_size=1)
    assert "no states to carry on in" in caplog.text
    assert again.fit()


def test_a_step_that_is_not_finite_is_not_carried_on(tmp_path: Path) -> None:
    trainer = build(tmp_path, "run", max_steps=3)
    learn = trainer.forward_backward
    seen: list[float] = []

    def spoil(micro_batches: list[dict[str, Tensor]]) -> Gradient:
        gradient = learn(micro_batches)
        seen.append(gradient.loss)
        if len(seen) == 1:
            assert trainer.carried is not None
            state = trainer.carried.before(0, ROWS)
            state["0.ssm"].fill_(math.nan)
            trainer.carried.after(0, state)
            gradient.loss = math.nan
        return gradient

    trainer.forward_backward = spoil  # type: ignore[method-assign]
    assert trainer.fit()
    assert all(math.isfinite(loss) for loss in seen)


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^training\.carry_state=True: the model's attention"):
        build(tmp_path, "run", "A")
    with pytest.raises(ConfigError, match=r"^training\.carry_state=True: the examples of data.kin"):
        prepare_data(DataConfig(kind=DataKind.recall), seed=0, streams=4)
    text = str(text_file(tmp_path))
    data = DataConfig(
        sources=[text, text, text], tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        sequence_length=32, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^training\.batch_size=2: with training\.carry_st"):
        prepare_data(data, seed=0, streams=2)


@pytest.mark.slow
def test_two_processes_carry_as_one(tmp_path: Path) -> None:
    text = text_file(tmp_path / "text")
    more = ("training.carry_state=true", "training.max_steps=12", "training.micro_batch_size=2")
    finish(start(tiny_run(text, tmp_path / "one", *more)))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(start(tiny_run(text, tmp_path / "two", *more), launcher=torchrun), timeout=300)
    curves = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("one", "two")
    ]
    assert len(curves[0]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
