"""Dropout: what is dropped, when, and that a run goes on as if it had not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2lm.schema import ConfigError
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.dropout import Dropout
from tests.inference import helpers
from tests.training.helpers import make_trainer, text_corpus
from tests.training.test_resume import assert_same_checkpoint, curve, sigterm_at, step_folder

IDS = torch.arange(60).view(2, 30)


def outputs_of(model: Any, calls: int = 1) -> list[Tensor]:
    """Return what the embedding and every mixer gave, before anything was dropped."""
    found: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).detach())

    modules = [model.embedding, *(block.mixer for block in model.blocks)]
    handles = [module.register_forward_hook(keep) for module in modules]
    for _ in range(calls):
        model(IDS)
    for handle in handles:
        handle.remove()
    return found


def test_a_share_is_dropped_and_the_rest_scaled_in_training_alone() -> None:
    model = helpers.model("MSAF").train()
    plain = outputs_of(model)[0]
    dropout = Dropout(model, 0.25, seed=1)
    dropout.begin_step(3)
    dropped = outputs_of(model)  # these hooks come after the dropping ones
    assert len(dropped) == 5
    for output in dropped:
        assert float((output == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    kept = dropped[0] != 0
    torch.testing.assert_close(dropped[0][kept], plain[kept] / 0.75)
    model.eval()
    assert outputs_of(model)[0].equal(plain)


def test_step_seed_and_rank_decide_what_is_dropped() -> None:
    def drawn(seed: int, step: int, rank: int) -> Tensor:
        model = helpers.model("M").train()
        Dropout(model, 0.5, seed=seed, rank=rank).begin_step(step)
        return outputs_of(model)[0]

    reference = drawn(1, 2, 0)
    assert drawn(1, 2, 0).equal(reference)
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not drawn(*other).equal(reference)


def test_recomputed_activations_drop_the_same() -> None:
    gradients = []
    for recompute in (False, True):
        model = helpers.model("MS").train()
        model.activation_checkpointing = recompute
        Dropout(model, 0.5, seed=0).begin_step(0)
        model(IDS, IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    settings: dict[str, Any] = {"max_steps": 6, "dropout": 0.3}
    make_trainer(tmp_path / "whole", corpus, **settings).fit()
    make_trainer(tmp_path / "run", corpus, tracker=sigterm_at(2), **settings).fit()
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = make_trainer(tmp_path / "run", corpus, **settings)
    assert resumed.progress.step == 3
    resumed.fit()
    assert_same_checkpoint(step_folder(tmp_path / "whole", 6), step_folder(tmp_path / "run", 6))
    make_trainer(tmp_path / "without", corpus, max_steps=6).fit()
    assert curve(tmp_path / "without") != curve(tmp_path / "whole")


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_impossible_shares_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^training\.dropout=.*must be in \[0, 1\)"):
        TrainingConfig(dropout=value).validate()
