"""Initial weights are distributed as in the released Mambas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mamba2lm.layers.mamba1 import Mamba1, Mamba1Config
from mamba2lm.layers.mamba2 import Mamba2, Mamba2Config
from mamba2lm.models import LanguageModel, ModelConfig


def mamba2(**fields: object) -> Mamba2:
    mixer = Mamba2(Mamba2Config(headdim=4, d_state=16, **fields), 512)  # type: ignore[arg-type]
    torch.manual_seed(0)
    mixer.init_weights()
    return mixer


def mamba1(**fields: object) -> Mamba1:
    mixer = Mamba1(Mamba1Config(**fields), 256)  # type: ignore[arg-type]
    torch.manual_seed(0)
    mixer.init_weights()
    return mixer


def test_mamba2_decays_are_uniform_in_their_range() -> None:
    for low, high in ((1.0, 16.0), (2.0, 3.0)):
        A_h = mamba2(A_init_range=[low, high]).A_log.detach().exp()
        assert A_h.dtype == torch.float32
        assert A_h.min() >= low * (1 - 1e-6)
        assert A_h.max() <= high * (1 + 1e-6)
        width = high - low
        assert abs(float(A_h.mean()) - (low + high) / 2) < 0.08 * width  # 256 heads: 4.4 sigma
        assert abs(float(A_h.std()) - width / math.sqrt(12)) < 0.06 * width


def test_mamba1_decays_are_one_to_n_in_every_channel() -> None:
    A_in = mamba1(d_state=7).A_log.exp()
    torch.testing.assert_close(A_in, torch.arange(1.0, 8.0).expand(512, 7))


@pytest.mark.parametrize("build", [mamba2, mamba1])
def test_steps_are_log_uniform_between_their_limits(build) -> None:  # type: ignore[no-untyped-def]
    mixer = build()
    bias = mixer.dt_bias if isinstance(mixer, Mamba2) else mixer.dt_proj.bias
    step = F.softplus(bias.detach())
    assert step.min() >= 1e-3 * (1 - 1e-3)
    assert step.max() <= 0.1 * (1 + 1e-3)
    log_range = math.log(0.1) - math.log(1e-3)
    middle = (math.log(0.1) + math.log(1e-3)) / 2
    assert abs(float(step.log().mean()) - middle) < 0.08 * log_range
    assert abs(float(step.log().std()) - log_range / math.sqrt(12)) < 0.06 * log_range


@pytest.mark.parametrize("build", [mamba2, mamba1])
def test_steps_have_a_floor(build) -> None:  # type: ignore[no-untyped-def]
    mixer = build(dt_min=1e-7, dt_max=1e-3, dt_init_floor=1e-4)
    bias = mixer.dt_bias if isinstance(mixer, Mamba2) else mixer.dt_proj.bias
    step = F.softplus(bias.detach())
    assert float(step.min()) == pytest.approx(1e-4, rel=1e-3)
    assert (step < 1.01e-4).float().mean() > 0.5
    assert step.max() > 2e-4


@pytest.mark.parametrize("build", [mamba2, mamba1])
def test_skips_and_norms_are_ones(build) -> None:  # type: ignore[no-untyped-def]
    mixer = build()
    assert (mixer.D == 1).all()
    assert mixer.D.dtype == mixer.A_log.dtype == torch.float32
    if isinstance(mixer, Mamba2):
        assert (mixer.norm.weight == 1).all()


def test_mamba1_step_projection_is_uniform_in_its_rank() -> None:
    mixer = mamba1()
    assert mixer.dt_rank == 256 // 16
    bound = mixer.dt_rank**-0.5
    weight = mixer.dt_proj.weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.02 * bound


@pytest.mark.parametrize("n_layers", [1, 4, 16])
def test_what_writes_to_the_residual_stream_is_scaled_by_depth(n_layers: int) -> None:
    config = ModelConfig(pattern="M", n_layers=n_layers, d_model=128, vocab_size=300)
    model = LanguageModel(config)
    model.init_weights(seed=1)
    # nn.Linear's default is U(±fan_in^-1/2), whose standard deviation is a √3 smaller.
    for block in model.blocks:
        weight = block.mixer.residual_weight()
        expected = weight.shape[1] ** -0.5 / math.sqrt(3) / math.sqrt(n_layers)
        assert abs(weight.std().item() / expected - 1) < 0.02
        other = block.mixer.in_proj.weight  # type: ignore[union-attr]
        assert abs(other.std().item() / (128**-0.5 / math.sqrt(3)) - 1) < 0.02


def test_embedding_is_normal_and_seeds_decide_everything() -> None:
    config = ModelConfig(pattern="MSAF", d_model=128, vocab_size=500)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.randint(1000, ()).item())  # type: ignore[arg-type]
        models.append(LanguageModel(config))
        models[-1].init_weights(seed)
    first, again, other = ([p.detach() for p in model.parameters()] for model in models)
    assert abs(models[0].embedding.weight.std().item() - 0.02) < 3e-4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differ = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    constant = [bool((p == p.flatten()[0]).all()) for p in first]
    names = [name for name, _ in models[0].named_parameters()]
    fixed = [n for n, d, c in zip(names, differ, constant, strict=True) if not d and not c]
    assert fixed == ["layers.1.mixer.A_log"]  # Mamba-1's, which is 1 … N


def test_init_leaves_the_global_random_state_alone() -> None:
    model = LanguageModel(ModelConfig(pattern="M", n_layers=1, vocab_size=20, d_model=64))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.init_weights(seed=9)
    assert torch.equal(torch.rand(3), expected)
