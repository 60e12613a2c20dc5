"""Every preset composes, builds without memory, and has the size it says it has."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from benchmarks import measure
from mamba2lm.cli import CONFIGS
from mamba2lm.config import TrainConfig
from mamba2lm.data.tokenizer import TokenizerKind
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.training.optimizer import OptimizerKind
from mamba2lm.training.precision import Precision
from mamba2lm.training.schedule import ScheduleKind
from tests.models.composing import train_config

PRESETS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
RELEASED = {
    **{f"mamba1_{size}": MambaForCausalLM for size in ("130m", "370m", "790m", "1_4b", "2_8b")},
    **{f"mamba2_{size}": Mamba2ForCausalLM for size in ("130m", "370m", "780m", "1_3b", "2_7b")},
}
SIZES = ("130m", "370m", "1_3b")


@functools.cache
def preset(name: str) -> ModelConfig:
    """Compose a preset once; tests do not change it."""
    config = train_config(f"model={name}").model
    config.validate()
    config.fit_vocabulary(257)
    return config


@functools.cache
def on_meta(name: str) -> LanguageModel:
    """Build a preset once, without storage."""
    with torch.device("meta"):
        return LanguageModel(preset(name))


def test_the_promised_presets_are_there() -> None:
    promised = {
        *RELEASED,
        "mamba2_attention_2_7b",
        *(f"{kind}_{size}" for kind in ("hybrid", "transformer") for size in SIZES),
        *(f"{kind}_tiny" for kind in ("mamba1", "mamba2", "hybrid", "transformer")),
        "quickstart",
    }
    assert promised == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_builds_on_the_meta_device(name: str) -> None:
    model = on_meta(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.parameter_count() > 100_000
    assert model.flops_per_token(2048) > 1.5 * model.parameter_count()


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"quickstart"}))
def test_comment_names_the_size(name: str) -> None:
    text = (CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    count = on_meta(name).parameter_count()
    if name.endswith("_tiny"):
        assert "half a million" in text.splitlines()[0]
        assert 450_000 < count < 550_000
    else:
        assert f"{count:,} parameters" in text


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_equal_those_of_transformers_model(name: str) -> None:
    config = preset(name)
    assert config.vocab_size == 50277
    shape: dict[str, Any] = {
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.letters),
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": True,
    }
    if name.startswith("mamba1"):
        assert config.padded_vocab_size == 50280
        theirs: Any = MambaConfig(**shape)
    else:
        assert config.padded_vocab_size == 50288
        heads = 2 * config.d_model // 64
        theirs = Mamba2Config(**shape, num_heads=heads, head_dim=64, state_size=128, n_groups=1)
    with torch.device("meta"):
        reference = RELEASED[name](theirs)
    assert on_meta(name).parameter_count() == sum(p.numel() for p in reference.parameters())


def test_mamba2_2_7b_has_the_released_number_of_parameters() -> None:
    assert on_meta("mamba2_2_7b").parameter_count() == 2_702_599_680


def test_mamba1_130m_has_the_released_number_of_parameters() -> None:
    assert on_meta("mamba1_130m").parameter_count() == 129_135_360


def test_the_papers_hybrid_has_its_attention_where_it_was() -> None:
    config = preset("mamba2_attention_2_7b")
    assert len(config.letters) == 64
    places = [i for i, letter in enumerate(config.letters) if letter == "A"]
    assert places == [9, 18, 27, 36, 45, 56]
    model = on_meta("mamba2_attention_2_7b")
    # Counted by hand: q, k, v and output projections, the convolution with its bias, the norm.
    d_qkv = 3 * 30 * 128
    attention = 2560 * d_qkv + 30 * 128 * 2560 + d_qkv * (4 + 1) + 2560
    mamba = on_meta("mamba2_2_7b")
    per_mamba = sum(p.numel() for p in mamba.blocks[0].parameters())
    block = model.blocks[9]
    assert sum(p.numel() for p in block.parameters()) == attention
    difference = 6 * (attention - per_mamba)
    assert model.parameter_count() == mamba.parameter_count() + difference


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["hybrid", "transformer"])
def test_compared_architectures_have_matched_parameters(kind: str, size: str) -> None:
    names = (f"{kind}_{size}", f"mamba2_{size}")
    config, reference = (preset(name) for name in names)
    count, expected = (on_meta(name).parameter_count() for name in names)
    assert abs(count / expected - 1) < 0.01
    assert config.d_model == reference.d_model
    assert config.padded_vocab_size == reference.padded_vocab_size
    share = config.letters.count("A") / len(config.letters)
    assert share == 0.5 if kind == "transformer" else 0.1 < share < 0.14


@pytest.mark.parametrize("size", SIZES)
def test_hybrids_begin_and_end_with_mamba(size: str) -> None:
    letters = preset(f"hybrid_{size}").letters
    runs = [len(run) for run in letters.split("A")]
    assert max(runs) - min(runs) <= 1
    assert re.fullmatch("[MA]+", letters)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_valid(name: str) -> None:
    config = train_config(f"experiment={name}")
    config.validate()
    assert config.run_dir == f"runs/{name}"
    config.training.share_of(1)
    assert config.schedule.warmup_steps < config.training.max_steps


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid", "transformer"])
def test_130m_experiments_follow_the_papers_recipe(kind: str) -> None:
    # Text and tokenizer are the user's choice: an experiment leaves those of the data group alone.
    config = train_config(f"experiment={kind}_130m", "data=bytes")
    assert config.data.tokenizer.kind is TokenizerKind.bytes
    config.model.fit_vocabulary(257)
    assert config.model == preset(f"{kind}_130m")
    assert config.optimizer.kind is OptimizerKind.adamw
    assert config.optimizer.learning_rate == pytest.approx(5 * 6e-4)
    assert config.optimizer.betas == [0.9, 0.95]
    assert config.optimizer.weight_decay == 0.1
    assert config.schedule.kind is ScheduleKind.cosine
    assert config.optimizer.learning_rate * config.schedule.min_ratio == pytest.approx(
        1e-5, rel=0.02
    )
    assert config.training.max_grad_norm == 1.0
    assert config.training.precision is Precision.bf16
    assert config.training.batch_size * config.data.sequence_length == 2**19
    tokens = config.training.max_steps * 2**19
    assert tokens == pytest.approx(2.5e9, rel=0.01)


def test_experiments_differ_only_in_their_model() -> None:
    def rest(name: str) -> dict[str, Any]:
        config: TrainConfig = train_config(f"experiment={name}")
        config.model.fit_vocabulary(50277)
        plain = config.resolved()
        return {key: value for key, value in plain.items() if key not in ("model", "run_dir")}

    reference = rest("mamba2_130m")
    for kind in ("mamba1", "hybrid", "transformer"):
        assert rest(f"{kind}_130m") == reference


@pytest.mark.parametrize("name", ["mamba2_130m", "hybrid_tiny"])
def test_a_preset_can_be_changed_on_the_command_line(name: str) -> None:
    changed = train_config(
        f"model={name}", "model.mixers.M.d_state=48", "model.d_model=192", "model.vocab_multiple=32"
    ).model
    assert changed.mixer_config("M").d_state == 48  # type: ignore[attr-defined]
    assert changed.d_model == 192
    assert changed.pattern == preset(name).pattern
    changed.validate()


def test_a_released_vocabulary_takes_a_smaller_tokenizer() -> None:
    config = train_config("model=mamba2_130m").model
    config.fit_vocabulary(4096)
    assert config.vocab_size == 50277


def test_benchmarks_take_presets_and_name_what_is_none() -> None:
    config = measure.preset("hybrid_130m", ["d_model=512", "++vocab_size=300"])
    assert (config.d_model, config.vocab_size, len(config.letters)) == (512, 300, 25)
    with pytest.raises(SystemExit, match=r"^error: 'mamba2_13m' is no preset. Did you mean 'mamba"):
        measure.preset("mamba2_13m")
