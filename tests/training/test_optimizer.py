"""Which parameters decay, which go to Muon, and that the state survives a round trip."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.checkpoint import StoredTensors
from mamba2lm.models.config import default_mixers
from mamba2lm.ops import kernels
from mamba2lm.ops.copies import kept_copy
from mamba2lm.schema import ConfigError
from mamba2lm.training.adamw import AdamW
from mamba2lm.training.muon import Muon
from mamba2lm.training.optimizer import (
    AdamWImpl,
    OptimizerConfig,
    OptimizerKind,
    Optimizers,
    build_optimizers,
)
from tests.ops.kernel_runs import DEVICE, run_in_interpreter, runs_kernels
from tests.training.helpers import make_trainer, recall_corpus, tiny_model

# The matrices of each mixer that are products with the stream; all else is never decayed.
MATRICES = {
    "M": {"mixer.in_proj.weight", "mixer.out_proj.weight"},
    "S": {
        "mixer.in_proj.weight",
        "mixer.x_proj.weight",
        "mixer.dt_proj.weight",
        "mixer.out_proj.weight",
    },
    "A": {"mixer.in_proj.weight", "mixer.out_proj.weight"},
    "F": {"mixer.fc1.weight", "mixer.fc2.weight"},
}
KINDS = [OptimizerKind.adamw, OptimizerKind.muon]


def names_of(model: LanguageModel, parameters: list[Tensor]) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in parameters}  # type: ignore[index]


def matrices_of(pattern: str) -> set[str]:
    return {
        f"layers.{number}.{name}"
        for number, letter in enumerate(pattern * 2)
        for name in MATRICES[letter]
    }


@pytest.mark.parametrize("pattern", ["M", "S", "A", "F", "MSAF"])
def test_adamw_decays_matrices_and_the_embedding_only(pattern: str) -> None:
    model = tiny_model(pattern)
    [adamw] = build_optimizers(OptimizerConfig(weight_decay=0.1), model)
    decay = {
        group["weight_decay"]: names_of(model, group["params"]) for group in adamw.param_groups
    }
    assert decay[0.1] == matrices_of(pattern) | {"embedding.weight"}
    assert decay[0.0] == {name for name, _ in model.named_parameters()} - decay[0.1]
    assert {"norm_f.weight", "layers.0.norm.weight"} <= decay[0.0]


def test_mamba_never_decays_what_sets_its_time_scale() -> None:
    model = tiny_model("MS")
    [adamw] = build_optimizers(OptimizerConfig(), model)
    spared = names_of(model, adamw.param_groups[1]["params"])
    mamba2 = ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight")
    mamba1 = ("A_log", "D", "dt_proj.bias", "conv1d.weight", "conv1d.bias")
    assert {f"layers.0.mixer.{name}" for name in mamba2} <= spared
    assert {f"layers.1.mixer.{name}" for name in mamba1} <= spared


@pytest.mark.parametrize("pattern", ["M", "MSAF"])
@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_inside_the_blocks(pattern: str, tied: bool) -> None:
    model = tiny_model(pattern, tie_embeddings=tied)
    config = OptimizerConfig(OptimizerKind.muon, weight_decay=0.3, adamw_scale=0.5)
    adamw, muon = build_optimizers(config, model)
    assert isinstance(muon, Muon)
    [group] = muon.param_groups
    assert names_of(model, group["params"]) == matrices_of(pattern)
    assert group["weight_decay"] == 0.3
    ends = {"embedding.weight"} | (set() if tied else {"lm_head.weight"})
    assert names_of(model, adamw.param_groups[0]["params"]) == ends
    everything = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings: dict[str, float] = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    steps = (
        Muon([ours], **settings),
        torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in steps:
            optimizer.step()
        assert torch.equal(ours, theirs)
    # Singular values of an update are about one, times 0.2 √(longer side), times the rate.
    before = ours.detach().clone()
    ours.grad = torch.randn(shape, generator=generator)
    steps[0].param_groups[0]["weight_decay"] = 0.0
    steps[0].step()
    values = torch.linalg.svdvals((before - ours).detach()) / (0.01 * 0.2 * max(shape) ** 0.5)
    assert 0.6 < values.min() <= values.max() < 1.3


def test_learning_rates_keep_their_ratio() -> None:
    model = tiny_model("M")
    optimizers = Optimizers(OptimizerConfig(OptimizerKind.muon, adamw_scale=0.5), model)
    optimizers.set_learning_rate(0.02)
    adamw, muon = optimizers.each
    assert [group["lr"] for group in adamw.param_groups] == [0.01, 0.01]
    assert [group["lr"] for group in muon.param_groups] == [0.02]


def take_step(model: LanguageModel, optimizers: Optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(257, (2, 17), generator=generator)
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    assert loss is not None
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_file_bit_for_bit(kind: OptimizerKind, tmp_path: Path) -> None:
    model = tiny_model("MSAF")
    optimizers = Optimizers(OptimizerConfig(kind), model)
    for seed in range(3):
        take_step(model, optimizers, seed)
    before = optimizers.state_tensors()
    save_file(before, tmp_path / "optimizer.safetensors")

    twin = copy.deepcopy(model)
    restored = Optimizers(OptimizerConfig(kind), twin)
    restored.load(StoredTensors(tmp_path, "optimizer"), None)
    after = restored.state_tensors()
    assert before.keys() == after.keys()
    states = {name.rsplit("::", 1)[1] for name in before}
    adamw_states = {"step", "exp_avg", "exp_avg_sq"}
    assert states == adamw_states | ({"momentum_buffer"} if kind is OptimizerKind.muon else set())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    take_step(model, optimizers, 9)
    take_step(twin, restored, 9)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    fresh = copy.deepcopy(twin)
    take_step(twin, restored, 10)
    take_step(fresh, Optimizers(OptimizerConfig(kind), fresh), 10)
    assert not torch.equal(twin.embedding.weight, fresh.embedding.weight)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizers = Optimizers(OptimizerConfig(), tiny_model("M"))
    save_file({"layers.9.mixer.D::exp_avg": torch.ones(4)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"unknown parameter layers\.9\.mixer\.D"):
        optimizers.load(StoredTensors(tmp_path, "optimizer"), None)


def test_clipping_scales_the_whole_gradient() -> None:
    model = tiny_model("M")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(before)
    assert norm > 2
    optimizers = Optimizers(OptimizerConfig(), model)
    optimizers.clip(norm, 2.0)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    for long, short in zip(before, after, strict=True):
        torch.testing.assert_close(short, long * (2.0 / norm), rtol=1e-4, atol=1e-7)
    kept = [gradient.clone() for gradient in after]
    optimizers.clip(torch.nn.utils.get_total_norm(after), 5.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("weight_decay", -0.1), ("betas", [0.9, 1.0]), ("betas", [0.9])],
)
def test_impossible_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.{name}="):
        OptimizerConfig(**{name: value}).validate()  # type: ignore[arg-type]


@pytest.mark.skipif(kernels.INTERPRETED or torch.cuda.is_available(), reason="kernels run")
def test_a_kernel_that_cannot_run_is_named() -> None:
    model = tiny_model("M")
    with pytest.raises(ConfigError, match=r"optimizer\.impl='?triton.*need a GPU"):
        Optimizers(OptimizerConfig(impl=AdamWImpl.triton), model)
    [chosen] = Optimizers(OptimizerConfig(impl=AdamWImpl.auto), model).each
    assert isinstance(chosen, torch.optim.AdamW)


def gradients_for(model: LanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(model.parameters()):
        if number == 3 and seed == 1:
            continue  # a parameter may be without a gradient in some step
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_matches_torch_and_reads_its_states(kind: OptimizerKind, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    ours, theirs = tiny_model("MF").to(DEVICE), tiny_model("MF").to(DEVICE)
    one_pass = Optimizers(OptimizerConfig(kind, impl=AdamWImpl.triton), ours)
    plain = Optimizers(OptimizerConfig(kind), theirs)
    assert isinstance(one_pass.each[0], AdamW)
    assert isinstance(plain.each[0], torch.optim.AdamW)
    for seed in range(3):
        for model, optimizers in ((ours, one_pass), (theirs, plain)):
            optimizers.set_learning_rate(1e-2 * (seed + 1))
            gradients_for(model, seed)
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]
            )
            optimizers.clip(norm, 1.0)
            optimizers.step()
            optimizers.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7, msg=name)
    mine, others = one_pass.state_tensors(), plain.state_tensors()
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        assert mine[name].dtype == tensor.dtype
        torch.testing.assert_close(mine[name], tensor, rtol=2e-6, atol=2e-7, msg=name)

    # Each goes on from what the other saved.
    for source, model, impl in ((others, theirs, AdamWImpl.triton), (mine, ours, AdamWImpl.torch)):
        save_file(source, tmp_path / "optimizer.safetensors")
        resumed = Optimizers(OptimizerConfig(kind, impl=impl), model)
        resumed.load(StoredTensors(tmp_path, "optimizer"), None)
        gradients_for(model, 9)
        resumed.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-7, msg=name)


@runs_kernels
def test_a_step_that_is_not_taken_one_pass_leaves_no_trace() -> None:
    pytest.importorskip("triton")
    model = tiny_model("M").to(DEVICE)
    optimizers = Optimizers(OptimizerConfig(impl=AdamWImpl.triton), model)
    before = [p.detach().clone() for p in model.parameters()]
    gradients_for(model, 0)
    optimizers.clip(torch.tensor(float("nan"), device=DEVICE), 1.0)
    optimizers.zero_grad()
    optimizers.step()  # nothing has a gradient
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    gradients_for(model, 2)
    optimizers.clip(torch.tensor(0.5, device=DEVICE), 1.0)
    optimizers.step()
    assert {float(v) for n, v in optimizers.state_tensors().items() if n.endswith("::step")} == {1}
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="for the interpreter: its trainer has no GPU")
def test_a_run_in_one_pass_is_resumed_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    corpus = recall_corpus()
    runs = []
    for folder, resume in (("whole", "never"), ("rest", str(tmp_path / "whole"))):
        if folder == "rest":
            last = tmp_path / "whole" / "checkpoints" / "step_00000004"
            shutil.rmtree(last)
        trainer = make_trainer(
            tmp_path / folder,
            corpus,
            tiny_model("F", vocab_size=corpus.vocab_size),
            resume=resume,
            optimizer=OptimizerConfig(impl=AdamWImpl.triton),
            max_steps=4,
            save_every=2,
        )
        assert trainer.progress.step == (0 if folder == "whole" else 2)
        assert trainer.fit()
        assert isinstance(trainer.optimizers.each[0], AdamW)
        runs.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="the same tests run directly"
)
def test_one_pass_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_interpreter(__file__, "one_pass", passed=4)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M", "S", "AF"])
def test_training_in_one_pass_is_that_of_torch_and_its_copies_stay_true(pattern: str) -> None:
    shape: dict[str, int] = {"d_model": 128, "vocab_size": 264}
    losses = {}
    for impl in (AdamWImpl.torch, AdamWImpl.triton):
        model = LanguageModel(
            ModelConfig(pattern=pattern, n_layers=4, mixers=default_mixers(), **shape)
        )
        model.init_weights(0)
        model.cuda()
        optimizers = Optimizers(OptimizerConfig(learning_rate=3e-3, impl=impl), model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(32, (4, 129), generator=generator).cuda()
        losses[impl] = []
        for _ in range(12):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids[:, :-1], ids[:, 1:]).loss
            assert loss is not None
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            optimizers.clip(torch.nn.utils.get_total_norm(gradients), 1.0)
            optimizers.step()
            optimizers.zero_grad()
            losses[impl].append(loss.item())
        kept = {name: kept_copy(p) for name, p in model.named_parameters()}
        used = {name for name, copy in kept.items() if copy is not None}
        if impl is AdamWImpl.torch:
            assert not used
            continue
        assert used == matrices_of((pattern * 2)[:2]) | {"embedding.weight"}
        for name, parameter in model.named_parameters():
            copy = kept[name]
            if copy is not None and copy.tensor is not None:
                assert copy.is_of(parameter), name
                assert torch.equal(copy.tensor, parameter.detach().bfloat16()), name
    ours, theirs = losses[AdamWImpl.triton], losses[AdamWImpl.torch]
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
