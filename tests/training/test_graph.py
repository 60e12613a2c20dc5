"""Steps replayed from recordings: the same bits as launch by launch, whatever comes between."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba2lm.data import Corpus, DataConfig, TokenizerConfig, TokenizerKind, prepare_data
from mamba2lm.distributed import Mesh, ParallelConfig
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.models import LanguageModel
from mamba2lm.models.lora import LoRAConfig, add_lora
from mamba2lm.ops.documents import count_documents, document_bounds, document_ordinals, fixed
from mamba2lm.schema import ConfigError
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.graph import WARM_UP, StepGraphs, Tensors, step_graphs
from mamba2lm.training.metrics import read_metrics
from mamba2lm.training.objective import Gradient
from mamba2lm.training.optimizer import AdamWImpl, OptimizerConfig, OptimizerKind
from mamba2lm.training.precision import Precision
from tests.distributed.launch import run_on, torchrun
from tests.processes import ROOT
from tests.training.helpers import documents_file, make_trainer, tiny_config, tiny_model
from tests.training.recording import StandIn, stand_ins
from tests.training.test_resume import assert_same_checkpoint, curve, sigterm_at, step_folder

STEPS = 8


def corpus(
    folder: Path, *, packed: bool = True, length: int = 32, streams: int | None = None
) -> Corpus:
    """Return prose as bytes: documents of unequal length in windows, or text without ends."""
    file = documents_file(folder, (*(15, 63, 159, 40) * 20, 700, 90, 33, 9, 1200))
    config = DataConfig(
        sources=[str(file)],
        tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        sequence_length=length,
        reset_at_documents=packed,
        cache_dir=str(folder / "cache"),
    )
    return prepare_data(config, seed=0, streams=streams)


def train(
    folder: Path, name: str, pattern: str, data: Corpus, *, seed: int = 0, **settings: Any
) -> Path:
    """Train for some steps in a folder of this name; return the last checkpoint."""
    trainer = make_trainer(
        folder / name, data, tiny_model(pattern, seed=seed), **{"max_steps": STEPS, **settings}
    )
    trainer.fit()
    return step_folder(folder / name, trainer.progress.step)


def assert_same_run(folder: Path, ours: Path, theirs: Path) -> None:
    assert_same_checkpoint(ours, theirs)
    runs = [path.parent.parent for path in (ours, theirs)]
    assert curve(runs[0]) == curve(runs[1])
    assert all(math.isfinite(row[2]) for row in curve(runs[0]) if row[2] is not None)


@pytest.mark.parametrize(
    ("pattern", "packed", "settings"),
    [
        ("MF", True, {}),
        ("SA", True, {"micro_batch_size": 2, "eval_every": 3, "eval_batches": 2}),
        ("AF", False, {"micro_batch_size": 1}),
        ("M", True, {"dropout": 0.3, "micro_batch_size": 2}),
        ("MA", True, {"activation_checkpointing": True}),
    ],
)
def test_replayed_steps_learn_what_others_do(
    tmp_path: Path, pattern: str, packed: bool, settings: dict[str, Any]
) -> None:
    data = corpus(tmp_path, packed=packed)
    whole = train(tmp_path, "launched", pattern, data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        # Operators' code for CPUs does wait, to learn where documents begin.
        made = stand_ins(patch, waits=packed)
        replayed = train(tmp_path, "replayed", pattern, data, **settings)
    assert_same_run(tmp_path, replayed, whole)
    micro_steps = 4 // settings.get("micro_batch_size", 4)
    [stand_in] = made
    assert stand_in.recorded == min(micro_steps, 2)
    assert stand_in.replayed == (STEPS - WARM_UP) * micro_steps
    assert stand_in.forgotten == 1


def test_states_are_carried_from_replay_to_replay(tmp_path: Path) -> None:
    data = corpus(tmp_path, streams=4)
    settings = {"carry_state": True, "micro_batch_size": 2}
    whole = train(tmp_path, "launched", "MS", data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch)
        replayed = train(tmp_path, "replayed", "MS", data, **settings)
    assert made[0].replayed == (STEPS - WARM_UP) * 2
    assert_same_run(tmp_path, replayed, whole)
    assert (replayed / "carried.safetensors").read_bytes() == (
        whole / "carried.safetensors"
    ).read_bytes()


def test_a_replayed_run_can_stop_and_go_on(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    whole = train(tmp_path, "launched", "M", data, max_steps=12)
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch)
        train(tmp_path, "replayed", "M", data, max_steps=12, tracker=sigterm_at(5))
        resumed = train(tmp_path, "replayed", "M", data, max_steps=12, seed=5)
    assert [stand_in.replayed for stand_in in made] == [6 - WARM_UP, 6 - WARM_UP]
    assert_same_run(tmp_path, resumed, whole)


def test_a_replayed_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    data = corpus(tmp_path)

    def spoiled(name: str) -> Path:
        trainer = make_trainer(tmp_path / name, data, tiny_model("M"), max_steps=STEPS)
        learn = trainer.forward_backward

        def spoil(micro_batches: list[dict[str, Tensor]]) -> Gradient:
            gradient = learn(micro_batches)
            if trainer.progress.step == WARM_UP + 1:
                gradient.loss = math.nan
            return gradient

        trainer.forward_backward = spoil  # type: ignore[method-assign]
        assert trainer.fit()
        return step_folder(tmp_path / name, STEPS)

    whole = spoiled("launched")
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch)
        assert_same_checkpoint(spoiled("replayed"), whole)


def test_validation_takes_the_memory_of_recorded_passes_where_it_needs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = corpus(tmp_path)
    settings: dict[str, Any] = {"eval_every": 3, "eval_batches": 2}
    whole = train(tmp_path, "launched", "M", data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch)
        trainer = make_trainer(
            tmp_path / "short", data, tiny_model("M"), max_steps=STEPS, **settings
        )
        assert trainer.graphs is not None
        held_out = trainer.validation.held_out

        def short_of_memory(alive: Callable[[], None]) -> dict[str, float]:
            if trainer.graphs is not None and trainer.graphs._recorded:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return held_out(alive)

        trainer.validation.held_out = short_of_memory  # type: ignore[method-assign]
        assert trainer.fit()
    # At steps 6 and 8; recorded at 4 and 7.
    assert (made[0].recorded, made[0].replayed) == (2, STEPS - WARM_UP)
    assert caplog.text.count("no memory was left beside recorded passes") == 2
    assert_same_run(tmp_path, step_folder(tmp_path / "short", STEPS), whole)


class Sums:
    """A micro-step of a small layer whose loss depends on where documents begin."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.parameters = [*self.layer.parameters(), self.frozen]

    def learn(self, inputs: Tensors) -> Tensors:
        x_blk = inputs["x"]
        loss = self.layer(x_blk).square().sum()
        if "seq_idx" in inputs:
            bounds_s = document_bounds(document_ordinals(inputs["seq_idx"]))
            first_s = bounds_s[:-1].clamp(max=x_blk.shape[0] * x_blk.shape[1] - 1)
            real_s = bounds_s[:-1] < bounds_s[1:]
            loss = loss + (self.layer(x_blk.flatten(0, 1)[first_s]).sum(dim=1) * real_s).sum()
        loss.backward()
        return {"loss": loss.detach()}

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def drop(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def draw(rows: int, seed: int, *, documents: int | None = None) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(rows, 8, 6, generator=generator)}
    if documents is not None:
        cuts = torch.zeros(rows * 8, dtype=torch.int64)
        cuts[torch.randperm(7, generator=generator)[: documents - rows] + 1] = 1
        inputs["seq_idx"] = cuts.cumsum(0).view(rows, 8)
        assert count_documents(inputs["seq_idx"]) == documents
    return inputs


def test_graphs_take_what_comes_between_them() -> None:
    """Other shapes run as they are, first in a step or later, and gradients add up all the same."""
    plain, ours = Sums(), Sums()
    stand_in = StandIn(ours.parameters)
    graphs = StepGraphs(ours.parameters, torch.device("cpu"), stand_in)
    steps = [[2, 2]] * WARM_UP + [[2, 3], [2, 2], [3, 2, 2], [2, 2, 2], [1], [2], [1, 2]]
    for step, sizes in enumerate(steps):
        ours.drop()
        plain.drop()
        for i, rows in enumerate(sizes):
            inputs = draw(rows, seed=10 * step + i)
            given = {name: tensor.clone() for name, tensor in inputs.items()}
            found = graphs.run(ours.learn, given, first=i == 0)
            for tensor in given.values():
                tensor.fill_(math.nan)  # read by now
            assert torch.equal(found["loss"], plain.learn(inputs)["loss"])
        for mine, theirs in zip(ours.gradients(), plain.gradients(), strict=True):
            assert torch.equal(mine, theirs), step
    assert (stand_in.recorded, stand_in.replayed) == (2, 10)
    assert ours.frozen.grad is None


def test_gradients_lie_where_they_were_recorded() -> None:
    sums = Sums()
    graphs = StepGraphs(sums.parameters, torch.device("cpu"), StandIn(sums.parameters))
    places = []
    for step in range(WARM_UP + 4):
        sums.drop()
        graphs.run(sums.learn, draw(2, step), first=True)
        places.append([gradient.data_ptr() for gradient in sums.gradients()])
    assert places[WARM_UP] == places[-1]


def test_more_documents_than_recorded_are_recorded_anew() -> None:
    plain, ours = Sums(), Sums()
    stand_in = StandIn(ours.parameters)
    graphs = StepGraphs(ours.parameters, torch.device("cpu"), stand_in)
    counts = [[2, 2]] * (WARM_UP + 1) + [[3, 3], [8, 2], [9, 3], [2, 2], [4, 9]]
    for step, documents in enumerate(counts):
        ours.drop()
        plain.drop()
        for i, count in enumerate(documents):
            inputs = draw(2, seed=10 * step + i, documents=count)
            found = graphs.run(ours.learn, dict(inputs), first=i == 0)
            assert torch.equal(found["loss"], plain.learn(inputs)["loss"])
        for mine, theirs in zip(ours.gradients(), plain.gradients(), strict=True):
            assert torch.equal(mine, theirs), (step, documents)
    # Room for 8 documents, then for 32.
    assert (stand_in.recorded, stand_in.forgotten) == (4, 1)


def test_a_rehearsal_that_finds_no_memory_is_run_again_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Room for more documents than there are may be what there is no memory for."""

    @contextlib.contextmanager
    def short_of_memory() -> Iterator[None]:
        yield
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")

    plain, ours = Sums(), Sums()
    stand_in = StandIn(ours.parameters)
    stand_in.rehearsal = short_of_memory
    device = torch.device("cpu")
    graphs = StepGraphs(ours.parameters, device, stand_in, strict=False)
    for step in range(WARM_UP + 2):
        ours.drop()
        plain.drop()
        inputs = draw(2, seed=step, documents=5)
        found = graphs.run(ours.learn, dict(inputs), first=True)
        assert torch.equal(found["loss"], plain.learn(inputs)["loss"])
        for mine, theirs in zip(ours.gradients(), plain.gradients(), strict=True):
            assert torch.equal(mine, theirs), step
    assert (stand_in.recorded, stand_in.replayed) == (0, 0)
    assert caplog.text.count("launch by launch: CUDA out of memory. Tried to allocate 2 GiB.") == 1

    strict = StepGraphs(ours.parameters, device, stand_in)
    strict.run(ours.learn, draw(2, seed=1), first=True)
    strict.run(ours.learn, draw(2, seed=2), first=True)
    with pytest.raises(ConfigError, match=r"^training\.cuda_graph=True: .*CUDA out of memory"):
        strict.run(ours.learn, draw(2, seed=3), first=True)


def test_gradients_leave_the_memory_of_passes_that_are_forgotten_within_a_step() -> None:
    plain, ours = Sums(), Sums()
    stand_in = StandIn(ours.parameters)
    graphs = StepGraphs(ours.parameters, torch.device("cpu"), stand_in)
    recorded: list[Tensor] = []
    for step, documents in enumerate([[2, 2]] * (WARM_UP + 2) + [[2, 9, 2], [2, 9]]):
        ours.drop()
        plain.drop()
        for i, count in enumerate(documents):
            inputs = draw(2, seed=10 * step + i, documents=count)
            found = graphs.run(ours.learn, dict(inputs), first=i == 0)
            assert torch.equal(found["loss"], plain.learn(inputs)["loss"])
            if count == 9 and stand_in.recorded == 2:
                old = {gradient.data_ptr() for gradient in recorded}
                assert not old & {gradient.data_ptr() for gradient in ours.gradients()}
        for mine, theirs in zip(ours.gradients(), plain.gradients(), strict=True):
            assert torch.equal(mine, theirs), (step, documents)
        recorded = ours.gradients()
    # The first of three was replayed before there were more documents, the other two were not.
    assert (stand_in.recorded, stand_in.forgotten) == (4, 1)
    assert stand_in.replayed == 2 * 2 + 1 + 2


def test_bounds_of_a_fixed_number_end_in_empty_documents() -> None:
    ids = torch.tensor([[7, 7, 2, 7], [0, 0, 0, 0], [0, 1, 1, 1]])
    with fixed(9) as held:
        ordinals = document_ordinals(ids)
        assert document_ordinals(ids) is ordinals
        assert not held.mattered
        bounds = document_bounds(ordinals)
        assert document_bounds(ordinals) is bounds
    assert held.mattered
    assert bounds.tolist() == [0, 2, 3, 4, 8, 9, 12, 12, 12, 12]
    assert bounds.dtype == torch.int32
    assert document_ordinals(ids) is not ordinals
    assert document_bounds(ordinals).tolist() == bounds.tolist()[:7]
    assert count_documents(ids) == 6


def test_what_waits_for_the_device_is_refused_or_runs_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # S4D cuts its convolution where documents begin, which the host has to know.
    data = corpus(tmp_path)

    def run(name: str) -> Path:
        return train(tmp_path, name, "LF", data, max_steps=5, micro_batch_size=2)

    whole = run("launched")
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch, waits=False)
        with pytest.raises(
            ConfigError, match=r"^training\.cuda_graph=True: a step cannot be recorded \(aten\."
        ) as raised:
            run("strict")
        assert "\n" not in str(raised.value)
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch, strict=False, waits=False)
        assert_same_checkpoint(run("lenient"), whole)
    assert made[0].recorded == 0
    assert caplog.text.count("cannot be recorded and runs launch by launch") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs a GPU, and this process computes on a cpu; use false"),
        ({"device": "cuda", "compile": True}, "does not record compiled blocks"),
        (
            {"device": "cuda", "dropout": 0.1, "activation_checkpointing": True},
            "cannot draw the same random numbers again",
        ),
        ({"device": "cuda", "processes": 2}, "for one process, or for those of parallel.tensor"),
    ],
)
def test_what_forbids_recording_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    device = torch.device(settings.pop("device", "cpu"))
    mesh = Mesh(
        ParallelConfig(), rank=0, processes=settings.pop("processes", 1), device=torch.device("cpu")
    )
    with pytest.raises(ConfigError) as raised:
        step_graphs(TrainingConfig(cuda_graph=True, **settings), mesh, device, [])
    assert str(raised.value).startswith("training.cuda_graph=True: ")
    assert said in str(raised.value)
    for lenient in (None, False):
        assert step_graphs(TrainingConfig(cuda_graph=lenient, **settings), mesh, device, []) is None


def test_the_command_refuses_it_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^training\.cuda_graph=True: needs a GPU"):
        make_trainer(tmp_path / "run", corpus(tmp_path), cuda_graph=True)
    assert make_trainer(tmp_path / "run", corpus(tmp_path), cuda_graph=None).graphs is None


def test_two_processes_of_a_tensor_group_replay_what_they_launched(tmp_path: Path) -> None:
    run_on(2, "-m", "tests.distributed.graphs", str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "device": "cpu", "whole sequences": True, "split sequences": True,
    }  # fmt: skip


@pytest.mark.multigpu
def test_two_gpus_of_a_tensor_group_replay_what_they_launched(tmp_path: Path) -> None:
    done = subprocess.run(
        torchrun(2, "-m", "tests.distributed.graphs", str(tmp_path)),
        cwd=ROOT,
        # Not over NVLink's multicast, which not every host has.
        env={**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "device": "cuda", "whole sequences": True, "split sequences": True,
    }  # fmt: skip


def wide_model(pattern: str, *, seed: int = 0) -> LanguageModel:
    """Return a model of sizes that all kernels take."""
    config = tiny_config(pattern, d_model=128)
    config.mixers["M"] |= {"headdim": 32, "d_state": 32}
    config.mixers["S"] |= {"d_state": 16}
    model = LanguageModel(config)
    model.init_weights(seed)
    return model


def on_gpu(
    folder: Path, name: str, pattern: str, data: Corpus, *, seed: int = 0, **settings: Any
) -> Path:
    """Train on a GPU."""
    values = {
        "max_steps": STEPS, "keep_outputs": False, "cpu": False, "cuda_graph": False, **settings
    }  # fmt: skip
    trainer = make_trainer(folder / name, data, wide_model(pattern, seed=seed), **values)
    trainer.fit()
    return step_folder(folder / name, trainer.progress.step)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
@pytest.mark.parametrize(
    ("pattern", "packed", "settings"),
    [
        ("M", True, {"micro_batch_size": 2}),
        ("M", False, {"keep_outputs": True, "num_workers": 2}),
        ("S", True, {"keep_outputs": True}),
        ("S", False, {"micro_batch_size": 1}),
        ("A", True, {"micro_batch_size": 2}),
        ("A", False, {}),
        ("F", False, {}),
        ("MSAF", True, {"micro_batch_size": 2, "eval_every": 2, "eval_batches": 2}),
        ("MAF", True, {"dropout": 0.3, "micro_batch_size": 2}),
        ("MA", True, {"activation_checkpointing": True}),
        ("M", True, {"keep_outputs": None, "profile_every": 3}),
    ],
)
def test_a_gpu_replays_what_it_launched(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    packed: bool,
    settings: dict[str, Any],
    precision: Precision,
) -> None:
    data = corpus(tmp_path, packed=packed)
    settings = {**settings, "precision": precision}
    whole = on_gpu(tmp_path, "launched", pattern, data, **settings)
    with caplog.at_level(logging.INFO, logger="mamba2lm.training.graph"):
        replayed = on_gpu(tmp_path, "replayed", pattern, data, cuda_graph=True, **settings)
    assert_same_run(tmp_path, replayed, whole)
    said = [r.getMessage() for r in caplog.records if r.name == "mamba2lm.training.graph"]
    passes = [message.split()[3] for message in said]
    assert passes == ["first", "next"][: min(2, 4 // settings.get("micro_batch_size", 4))]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [AdamWImpl.triton, AdamWImpl.torch])
def test_a_gpu_replays_long_rows_and_resumes(tmp_path: Path, impl: AdamWImpl) -> None:
    data = corpus(tmp_path, length=1024)  # enough tokens for the embedding's gradient to be sorted
    settings: dict[str, Any] = {
        "precision": Precision.bf16, "max_steps": 12, "optimizer": OptimizerConfig(impl=impl),
    }  # fmt: skip
    whole = on_gpu(tmp_path, "launched", "MF", data, **settings)
    settings["cuda_graph"] = True
    on_gpu(tmp_path, "replayed", "MF", data, tracker=sigterm_at(5), **settings)
    resumed = on_gpu(tmp_path, "replayed", "MF", data, seed=5, **settings)
    assert_same_run(tmp_path, resumed, whole)


@pytest.mark.gpu
def test_a_gpu_carries_states_from_replay_to_replay(tmp_path: Path) -> None:
    data = corpus(tmp_path, streams=4)
    settings: dict[str, Any] = {
        "carry_state": True, "micro_batch_size": 2, "precision": Precision.bf16,
    }  # fmt: skip
    whole = on_gpu(tmp_path, "launched", "MS", data, **settings)
    replayed = on_gpu(tmp_path, "replayed", "MS", data, cuda_graph=True, **settings)
    assert_same_run(tmp_path, replayed, whole)
    assert (replayed / "carried.safetensors").read_bytes() == (
        whole / "carried.safetensors"
    ).read_bytes()


def writes(data: Corpus) -> Callable[[LanguageModel], str]:
    """Return what has a model write a few words, by an engine of its own."""
    tokenizer = data.tokenizer
    assert tokenizer is not None

    def write(model: LanguageModel) -> str:
        [completion] = Engine(model, tokenizer).generate(
            ["It"], SamplingConfig(temperature=0.7), max_new_tokens=8, seeds=0
        )
        return completion.text

    return write


@pytest.mark.gpu
def test_a_gpu_writes_samples_by_graphs_of_its_own_between_replays(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    settings: dict[str, Any] = {
        "write_sample": writes(data), "sample_every": 1, "precision": Precision.bf16,
        "dropout": 0.1,
    }  # fmt: skip
    whole = on_gpu(tmp_path, "launched", "M", data, **settings)
    replayed = on_gpu(tmp_path, "replayed", "M", data, cuda_graph=True, **settings)
    assert_same_run(tmp_path, replayed, whole)
    written = [(run.parent.parent / "samples.txt").read_text() for run in (replayed, whole)]
    assert written[0] == written[1]
    assert written[0].count("=== step") == STEPS


def whole_run(
    folder: Path, name: str, pattern: str, *, seed: int = 0, stopped: bool = False, **settings: Any
) -> Path:
    """Train with validation, samples, checkpoints, perhaps a stop, and odd batches at the end."""
    data = corpus(folder)
    trainer = make_trainer(
        folder / name, data, wide_model(pattern, seed=seed), num_workers=2,
        write_sample=writes(data),
        max_steps=14, batch_size=8, micro_batch_size=2, dropout=0.1, eval_every=2, eval_batches=2,
        sample_every=5, save_every=4, tracker=sigterm_at(6) if stopped else None,
        # A run that goes on makes outputs again for two steps, then decides whether to keep them:
        # the same to the last bit, or the test fails.
        keep_outputs=None, **settings,
    )  # fmt: skip
    learn = trainer.forward_backward

    def cut_the_last(micro_batches: list[dict[str, Tensor]]) -> Gradient:
        if trainer.progress.step == 13:
            micro_batches[0] = {k: v[:, :-5] for k, v in micro_batches[0].items()}
            micro_batches[-1] = {k: v[:1] for k, v in micro_batches[-1].items()}
        return learn(micro_batches)

    trainer.forward_backward = cut_the_last  # type: ignore[method-assign]
    assert trainer.fit() is not stopped
    return step_folder(folder / name, 7 if stopped else 14)


def assert_same_whole_run(folder: Path, ours: Path, theirs: Path) -> None:
    assert_same_run(folder, ours, theirs)
    written = [(path.parent.parent / "samples.txt").read_text() for path in (ours, theirs)]
    assert written[0] == written[1]
    assert written[0].count("=== step") == 3


def test_a_whole_run_is_the_same_replayed(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, "launched", "MA")
    with pytest.MonkeyPatch.context() as patch:
        made = stand_ins(patch)
        whole_run(tmp_path, "replayed", "MA", stopped=True)
        replayed = whole_run(tmp_path, "replayed", "MA", seed=5)
    assert_same_whole_run(tmp_path, replayed, whole)
    # Of steps 4 to 7, and 11 to 14, the last of which has two micro-batches that are like others.
    assert [stand_in.replayed for stand_in in made] == [4 * 4, 3 * 4 + 2]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["MSAF", "M"])
def test_a_whole_run_on_a_gpu_is_the_same_replayed(tmp_path: Path, pattern: str) -> None:
    settings: dict[str, Any] = {"cpu": False, "precision": Precision.bf16}
    whole = whole_run(tmp_path, "launched", pattern, cuda_graph=False, **settings)
    settings["cuda_graph"] = True
    whole_run(tmp_path, "replayed", pattern, stopped=True, **settings)
    replayed = whole_run(tmp_path, "replayed", pattern, seed=5, **settings)
    assert_same_whole_run(tmp_path, replayed, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["window", "inner norms", "LoRA", "muon", "grouped, tied"])
def test_a_gpu_replays_by_itself_what_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    data = corpus(tmp_path)

    def run(name: str, cuda_graph: bool | None) -> Path:
        config = tiny_config("MSAF", d_model=128, tie_embeddings=what == "grouped, tied")
        config.mixers["M"] |= {"headdim": 32, "d_state": 32}
        if what == "window":
            config.mixers["A"]["window"] = 9
        elif what == "inner norms":
            config.mixers["S"]["inner_norm"] = "learned"
        elif what == "grouped, tied":
            config.mixers["A"]["n_kv_heads"] = 1
            config.mixers["M"]["ngroups"] = 2
        model = LanguageModel(config)
        model.init_weights(0)
        if what == "LoRA":
            add_lora(model, LoRAConfig(rank=4))
        kind = OptimizerKind.muon if what == "muon" else OptimizerKind.adamw
        trainer = make_trainer(
            tmp_path / name, data, model, cpu=False, cuda_graph=cuda_graph, max_steps=STEPS,
            micro_batch_size=2, precision=Precision.bf16, optimizer=OptimizerConfig(kind),
            keep_outputs=True,
        )  # fmt: skip
        assert trainer.fit()
        return step_folder(tmp_path / name, STEPS)

    whole = run("launched", False)
    with caplog.at_level(logging.INFO, logger="mamba2lm.training.graph"):
        assert_same_run(tmp_path, run("replayed", None), whole)
    assert caplog.text.count("as a CUDA graph") == 2


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_recording_that_failed(tmp_path: Path) -> None:
    """In a process of its own, as what is left behind may be in disorder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.failed_recording", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be recorded and runs launch by launch" in done.stderr


@pytest.mark.gpu
def test_a_gpu_refuses_what_it_cannot_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = corpus(tmp_path)
    settings: dict[str, Any] = {"max_steps": 5}
    with pytest.raises(ConfigError, match=r"^training\.cuda_graph=True: a step cannot be recorded"):
        on_gpu(tmp_path, "strict", "LF", data, cuda_graph=True, **settings)
    whole = on_gpu(tmp_path, "launched", "LF", data, **settings)
    lenient = on_gpu(tmp_path, "lenient", "LF", data, cuda_graph=None, **settings)
    assert "cannot be recorded and runs launch by launch" in caplog.text
    for name in ("loss", "grad_norm"):
        ours, theirs = (
            [row[name] for row in read_metrics(path.parent.parent / "metrics.jsonl")]
            for path in (lenient, whole)
        )
        assert ours == pytest.approx(theirs, rel=1e-3)
