"""The loop: gradients of accumulated micro-batches, skipped steps, checkpoints kept."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2lm.models.checkpoint import checkpoints_of, pointed, verify
from mamba2lm.ops import dispatch
from mamba2lm.schema import ConfigError
from mamba2lm.training import trainer as trainer_module
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.faults import NonFiniteError
from mamba2lm.training.meter import mean
from mamba2lm.training.metrics import read_metrics
from mamba2lm.training.precision import Precision, matmul_dtype
from tests.training.helpers import Rows, make_trainer, recall_corpus, text_corpus, tiny_model


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def uneven_batch(rows: int = 4) -> dict[str, Tensor]:
    """Return recall samples whose rows have 4, 2, 0 and 3 labels left."""
    corpus = recall_corpus()
    samples = [corpus.train.sample(index) for index in range(rows)]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    for row, left in enumerate([4, 2, 0, 3]):
        [asked] = (batch["labels"][row] != -100).nonzero(as_tuple=True)
        batch["labels"][row, asked[left:]] = -100
    return batch


def test_micro_batches_of_uneven_labels_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    batch = uneven_batch()
    model = tiny_model("MA", vocab_size=64, seed=3)
    logits = model(batch["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(dict(model.named_parameters()))
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()

    for micro in (1, 2, 4):
        fresh = tiny_model("MA", vocab_size=64, seed=3)
        trainer = make_trainer(
            tmp_path / str(micro), recall_corpus(), fresh, micro_batch_size=micro, max_grad_norm=1e9
        )
        assert (trainer.micro_batch, trainer.micro_steps) == (micro, 4 // micro)
        parts = [
            {name: tensor[begin : begin + micro] for name, tensor in batch.items()}
            for begin in range(0, 4, micro)
        ]
        gradient = trainer.forward_backward(parts)
        assert not any(gradient.flags)
        assert gradient.loss == pytest.approx(expected.item(), rel=1e-6)
        assert gradient.norm == pytest.approx(norm, rel=1e-4)
        for name, parameter in fresh.named_parameters():
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m
            )


def test_a_step_without_any_label_changes_no_weight_by_its_gradient(tmp_path: Path) -> None:
    batch = uneven_batch()
    batch["labels"].fill_(-100)
    trainer = make_trainer(tmp_path, recall_corpus())
    gradient = trainer.forward_backward([batch])
    assert (gradient.loss, gradient.norm) == (0.0, 0.0)


def test_gradients_are_clipped_in_the_loop(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, recall_corpus(), max_grad_norm=0.01)
    norm = trainer.forward_backward([uneven_batch()]).norm
    assert norm > 0.1
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_training_curves_are_the_same_whatever_the_micro_batch(tmp_path: Path) -> None:
    corpus = recall_corpus()
    curves = []
    for micro in (4, 2, 1):
        run = tmp_path / str(micro)
        settings = {"max_steps": 6, "eval_every": 3, "eval_batches": 2}
        assert make_trainer(run, corpus, micro_batch_size=micro, **settings).fit()
        rows = read_metrics(run / "metrics.jsonl")
        curves.append([row.get("loss", row.get("val_loss")) for row in rows])
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)


def test_validation_is_the_mean_over_the_held_out_labels(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    trainer = make_trainer(tmp_path / "run", corpus)
    held_out = corpus.validation
    assert held_out is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(held_out)):
            sample = {name: t.unsqueeze(0) for name, t in held_out[index].items()}
            logits = trainer.model(sample["input_ids"], seq_idx=sample.get("seq_idx")).logits
            total += F.cross_entropy(logits[0], sample["labels"][0], reduction="sum").item()
            count += int((sample["labels"] != -100).sum())
    figures = trainer.validation.held_out()
    assert count == held_out.tokens
    assert figures["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert figures["val_bits_per_byte"] == pytest.approx(
        total / math.log(2) / held_out.bytes, rel=1e-5
    )
    assert trainer.model.training


def test_activation_checkpointing_does_not_change_the_curve(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    curves = []
    for name, value in (("kept", False), ("recomputed", True)):
        model = tiny_model("MSAF")
        trainer = make_trainer(
            tmp_path / name, corpus, model, activation_checkpointing=value, max_steps=6
        )
        assert model.activation_checkpointing is value
        trainer.fit()
        curves.append(losses(tmp_path / name))
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_training_lowers_the_loss(tmp_path: Path, precision: Precision) -> None:
    settings: dict[str, Any] = {"max_steps": 60, "batch_size": 8, "log_every": 10}
    trainer = make_trainer(tmp_path / "run", text_corpus(tmp_path), precision=precision, **settings)
    dtypes = set()
    block = trainer.model.blocks[0].mixer
    linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, given, result: dtypes.add(result.dtype))
    assert trainer.fit()
    assert dtypes == {matmul_dtype(precision, torch.device("cpu"))}
    assert dtypes == {torch.bfloat16 if precision is Precision.bf16 else torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    curve = losses(tmp_path / "run")
    assert curve[0] > 4.9
    assert curve[-1] < curve[0] - 1.0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    for name, value in (("eager", False), ("compiled", True)):
        make_trainer(tmp_path / name, corpus, compile=value, max_steps=6).fit()
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "compiled"), abs=1e-4)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_skips_its_step_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    moments: dict[int, dict[str, Tensor]] = {}

    def keep(step: int) -> None:
        states[step] = snapshot(trainer.model)
        moments[step] = {k: t.clone() for k, t in trainer.optimizers.state_tensors().items()}

    trainer = make_trainer(tmp_path / "run", text_corpus(tmp_path), tracker=Rows(keep), max_steps=6)
    calls = 0

    def poison(module: nn.Module, given: object, result: Any) -> Any:
        nonlocal calls
        calls += 1
        return result._replace(loss=result.loss * math.nan) if calls == 3 else result

    trainer.model.register_forward_hook(poison)
    with caplog.at_level(logging.WARNING):
        assert trainer.fit()
    warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert warnings == ["step 3 skipped: loss nan, gradient norm nan, samples 8 to 11"]
    assert same(states[2], states[3])
    assert same(moments[2], moments[3])
    for before, after in ((1, 2), (3, 4), (4, 5)):
        assert not same(states[before], states[after])
    assert [loss is None for loss in losses(tmp_path / "run")] == [
        step == 3 for step in range(1, 7)
    ]
    assert all(tensor.isfinite().all() for tensor in states[6].values())


def test_a_gradient_that_is_not_finite_skips_its_step_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", text_corpus(tmp_path), max_steps=2)
    before = snapshot(trainer.model)
    trainer.model.embedding.weight.register_hook(lambda gradient: gradient * math.inf)
    assert trainer.fit()
    assert same(before, snapshot(trainer.model))
    assert losses(tmp_path / "run") == [None, None]


def test_many_bad_steps_in_a_row_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Rows()
    trainer = make_trainer(
        tmp_path / "run", text_corpus(tmp_path), tracker=tracker, max_bad_steps=3
    )
    with torch.no_grad():
        trainer.model.norm_f.weight.fill_(math.inf)
    before = snapshot(trainer.model)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(NonFiniteError, match=r"3 steps in a row .* the last at step 3"),
    ):
        trainer.fit()
    warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert [text.rpartition("samples ")[2] for text in warnings] == ["0 to 3", "4 to 7", "8 to 11"]
    assert same(before, snapshot(trainer.model))
    assert trainer.optimizers.state_tensors() == {}
    assert checkpoints_of(tmp_path / "run") == []
    assert tracker.finished


def scripted(trainer: Any, figures: list[float]) -> None:
    """Make validations give these losses."""
    waiting = iter(figures)
    trainer.validation.held_out = lambda alive: {"val_loss": next(waiting), "val_perplexity": 1.0}


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"max_steps": 12, "eval_every": 2, "save_every": 2}
    trainer = make_trainer(run, text_corpus(tmp_path), keep_last=2, **settings)
    scripted(trainer, [3.0, 1.0, 2.0, 2.5, 1.5, 1.1])
    trainer.fit()
    names = [path.name for path in checkpoints_of(run)]
    assert names == ["step_00000004", "step_00000010", "step_00000012"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best", "latest", *names,
    ]  # fmt: skip
    assert pointed(run, "best") == run / "checkpoints" / "step_00000004"
    assert pointed(run, "latest") == run / "checkpoints" / "step_00000012"
    assert trainer.progress.best_val_loss == 1.0
    for path in checkpoints_of(run):
        verify(path)


def test_an_improvement_is_saved_between_the_regular_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, text_corpus(tmp_path), max_steps=8, eval_every=3, keep_last=1)
    scripted(trainer, [2.0, 1.0, 5.0])
    trainer.fit()
    assert [path.name for path in checkpoints_of(run)] == ["step_00000006", "step_00000008"]
    assert pointed(run, "best") == run / "checkpoints" / "step_00000006"


def test_the_best_checkpoint_is_not_kept_unless_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(
        run, text_corpus(tmp_path), max_steps=6, eval_every=2, keep_last=1, keep_best=False
    )
    scripted(trainer, [1.0, 2.0, 3.0])
    trainer.fit()
    assert [path.name for path in checkpoints_of(run)] == ["step_00000006"]
    assert pointed(run, "best") is None


def test_rows_average_the_steps_since_the_last_row(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    make_trainer(tmp_path / "each", corpus, max_steps=7, log_every=1).fit()
    make_trainer(tmp_path / "some", corpus, max_steps=7, log_every=3).fit()
    each = losses(tmp_path / "each")
    rows = read_metrics(tmp_path / "some" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 7]
    expected = [sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(mean([]))


def test_shares_of_a_step() -> None:
    assert TrainingConfig(batch_size=12).share_of(3) == (4, 1)
    assert TrainingConfig(batch_size=12, micro_batch_size=2).share_of(2) == (2, 3)
    assert TrainingConfig(batch_size=4, micro_batch_size=32).share_of(2) == (2, 1)
    with pytest.raises(ConfigError, match=r"training.batch_size=12: must be a multiple of .* 5"):
        TrainingConfig(batch_size=12).share_of(5)
    with pytest.raises(ConfigError, match=r"training.micro_batch_size=4: must divide .* 6 seq"):
        TrainingConfig(batch_size=12, micro_batch_size=4).share_of(2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0), ("batch_size", -1), ("log_every", 0), ("save_every", 0),
        ("keep_last", 0), ("max_bad_steps", 0), ("eval_every", -1), ("sample_tokens", -1),
        ("micro_batch_size", 0), ("eval_batches", 0), ("threads", 0), ("max_grad_norm", 0.0),
        ("peak_tflops", 0.0),
    ],
)  # fmt: skip
def test_impossible_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.{name}={value}: must be"):
        TrainingConfig(**{name: value}).validate()  # type: ignore[arg-type]


def test_the_log_says_what_the_operators_ran_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_taken", {})
    corpus = text_corpus(tmp_path / "text")
    trainer = make_trainer(tmp_path / "run", corpus, tiny_model("MA"), max_steps=2)
    with caplog.at_level(logging.INFO):
        trainer.fit()
    [line] = [r.getMessage() for r in caplog.records if "ran on" in r.getMessage()]
    assert "ssd cpu" in line
    assert "attention scaled_dot_product_attention" in line


@pytest.mark.parametrize("keep", [False, True])
def test_mixers_are_told_whether_to_keep_outputs(tmp_path: Path, keep: bool) -> None:
    model = tiny_model("MSA", vocab_size=64)
    trainer = make_trainer(tmp_path, recall_corpus(), model, keep_outputs=keep)
    assert {block.mixer.keep_outputs for block in trainer.model.blocks} == {keep}


@pytest.mark.parametrize("missing", [0, 1])
def test_outputs_are_kept_where_there_is_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    missing: int,
) -> None:
    model = tiny_model("MSA", vocab_size=64)
    trainer = make_trainer(tmp_path, recall_corpus(), model, keep_outputs=None, max_steps=3)
    # Two layers of each kind, 64 wide inside; of Mamba-2's convolution B and C of 16 besides.
    more = 4 * 32 * 4 * 2 * ((64 + 32 + 64) + 2 * 64)
    monkeypatch.setattr(trainer_module, "room_left", lambda _: more - missing)
    with caplog.at_level(logging.INFO):
        trainer.fit()
    assert {block.mixer.keep_outputs for block in model.blocks} == {missing == 0}
    [line] = [r.getMessage() for r in caplog.records if "outputs of Mamba" in r.getMessage()]
    assert ("no room" in line) == (missing > 0)
    assert f"{more / 2**10:.0f} KiB" in line
