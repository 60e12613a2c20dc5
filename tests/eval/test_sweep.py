"""A sweep as a user runs it: cells that learn, files to go on from, the best of the rates."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

import eval.sweep.__main__ as command
from eval.sweep.cell import Cell, Spec
from eval.sweep.config import Decay, Order, SweepConfig, SweepTask
from eval.sweep.data import SweepData
from eval.sweep.summary import best_points, draw
from mamba2lm.cli import CONFIGS, typed
from mamba2lm.data import RecallConfig, generate
from mamba2lm.schema import ConfigError
from mamba2lm.training.precision import Precision

CPU = torch.device("cpu")
STAGES = [
    {"length": 16, "items": 2, "n_examples": 96, "epochs": 2, "batch_size": 32},
    {"length": 24, "items": 3, "n_examples": 64, "epochs": 1, "batch_size": 16},
]
TESTS = [{"length": 16, "items": 2, "n_examples": 50}, {"length": 24, "items": 3, "n_examples": 9}]
M = {"pattern": "M", "mixers": {"M": {"d_state": 16, "headdim": 16, "chunk_size": 8}}}


def config(**changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "vocab_size": 32, "datasets": {"T": {"stages": STAGES, "tests": TESTS}}, "models": {"m": M},
        "widths": [16], "learning_rates": [3e-3, 1e-2], "evaluate_every": 4, "device": "cpu",
        "precision": Precision.fp32, "stop_at": None, **changes,
    }  # fmt: skip
    built = SweepConfig(**values)
    built.validate()
    return built


def cell_of(sweep: SweepConfig, device: torch.device = CPU, **spec: Any) -> Cell:
    values = {"dataset": "T", "model": "m", "width": 16, "learning_rate": 3e-3, "seed": 0, **spec}
    data = SweepData(sweep, sweep.datasets["T"], device)
    return Cell(Spec(**values), sweep, data, device)


def run(cell: Cell) -> Cell:
    while not cell.done:
        cell.advance(3)
    return cell


def test_a_cell_takes_every_batch_once_and_follows_its_schedule() -> None:
    cell = cell_of(config(decay=Decay.linear))
    assert cell.steps == 2 * 3 + 4
    rates, batches = [], []
    learn = cell._learn

    def watch(shape: tuple[int, int]) -> None:
        rates.append(float(cell.rate))
        stage = [each.batch for each in cell.shapes.stages].index(shape)
        known = cell.data.stages[stage].input_nl
        rows = [int((known == row).all(dim=1).nonzero()) for row in cell._batch[shape].input_nl]
        batches.append((stage, rows))
        learn(shape)

    cell._learn = watch  # type: ignore[method-assign]
    run(cell)
    assert rates == pytest.approx([3e-3 * (1 - i / 10) for i in range(10)])
    assert [stage for stage, _ in batches] == [0] * 6 + [1] * 4
    for part, size in ((batches[:3], 96), (batches[3:6], 96), (batches[6:], 64)):
        assert sorted(row for _, rows in part for row in rows) == list(range(size))
    assert [row["step"] for row in cell.curve] == [4, 8, 10]


def test_mixed_stages_alternate() -> None:
    cell = cell_of(config(order=Order.mixed))
    stages = [stage for stage, _ in cell._batches()]
    assert sorted(stages[:7]) == [0] * 3 + [1] * 4
    assert stages[:7] != sorted(stages[:7])
    assert stages[7:] == [0, 0, 0]


def test_examples_are_the_generators() -> None:
    sweep = config()
    data = SweepData(sweep, sweep.datasets["T"], CPU)
    task = RecallConfig(vocab_size=32, length=24, n_pairs=3)
    inputs, labels = generate(task, 64, seed=0, purpose="train 1")
    ids, places, answers = data.stages[1].rows(torch.arange(64))
    assert ids.equal(inputs)
    assert labels.gather(1, places).equal(answers)
    inputs, labels = generate(
        RecallConfig(vocab_size=32, length=16, n_pairs=2), 96, seed=0, purpose="train 0"
    )
    ids, places, answers = data.stages[0].rows(torch.arange(96))
    assert ids.equal(inputs)
    assert labels.gather(1, places).equal(answers)
    inputs, labels = generate(task, 64, seed=0, purpose="train 1")
    assert (labels != -100).sum() == 3 * 64
    ids, _, _ = data.tests[1].rows(slice(0, 9))
    assert ids.equal(generate(task, 9, seed=0)[0])


def test_stages_of_a_shape_have_as_many_questions() -> None:
    stages = [{"length": 16, "items": k, "n_examples": 32, "batch_size": 32} for k in (2, 4)]
    stages.append({**stages[0], "length": 24})
    sweep = config(datasets={"T": {"stages": stages, "tests": TESTS}})
    first, second, other = SweepData(sweep, sweep.datasets["T"], CPU).stages
    assert [each.answer_nk.shape[1] for each in (first, second, other)] == [4, 4, 2]
    assert first.answer_nk[:, 2:].eq(-100).all()
    assert first.answer_nk[:, :2].ge(16).all()  # values
    assert second.answer_nk.ge(16).all()


def test_the_loss_and_the_accuracy_are_the_models() -> None:
    cell = cell_of(config(evaluate_every=1))
    model = cell.model
    stage, rows = next(cell._batches())
    inputs, labels = generate(
        RecallConfig(vocab_size=32, length=16, n_pairs=2), 96, seed=0, purpose="train 0"
    )
    with torch.no_grad():
        expected = float(model(inputs[rows], labels[rows]).loss)
    cell.advance(1)
    assert stage == 0
    assert cell.curve[0]["loss"] == pytest.approx(expected, rel=1e-5)
    inputs, labels = generate(RecallConfig(vocab_size=32, length=24, n_pairs=3), 9, seed=0)
    with torch.no_grad():
        right = (model(inputs).logits.argmax(dim=-1) == labels).sum()
    assert cell.curve[0]["accuracy"][1] == pytest.approx(int(right) / 27)


def test_a_small_model_learns_and_stops_when_it_has() -> None:
    stage = {"length": 12, "items": 1, "n_examples": 4096, "epochs": 6, "batch_size": 64}
    test = {"length": 12, "items": 1, "n_examples": 200}
    datasets = {"T": {"stages": [stage], "tests": [test]}}
    sweep = config(vocab_size=8, stop_at=0.95, evaluate_every=8, datasets=datasets)
    cell = run(cell_of(sweep, learning_rate=1e-2))
    assert cell.step < cell.steps
    assert cell.curve[0]["loss"] > 1.0 > cell.curve[-1]["loss"]
    assert cell.curve[-1]["accuracy"][0] >= 0.95
    assert cell.result()["tests"][0]["accuracy"] == cell.curve[-1]["accuracy"][0]


def test_the_embedding_is_as_wide_as_asked() -> None:
    sweep = config(models={"m": M, "wide": {**M, "embedding_std": 0.5}})
    plain, wide = (cell_of(sweep, model=name).model.embedding.weight for name in ("m", "wide"))
    assert torch.allclose(wide, 25 * plain)
    assert float(plain.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_seed_decides_a_cell() -> None:
    curves = [run(cell_of(config(), seed=seed)).curve for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_diverged_cell_ends() -> None:
    cell = run(cell_of(config(evaluate_every=2), learning_rate=1e30))
    assert cell.step < cell.steps
    assert not math.isfinite(cell.curve[-1]["loss"])
    assert cell.result()["tests"][0]["accuracy"] is not None


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"output={folder}", "~datasets.T256", "~models.attention", "~models.attention_conv",
        "~models.mamba1_n16", "~models.mamba2_n64", "~models.mamba2_n256", "~models.hybrid_n16",
        "vocab_size=16",
        "+datasets.T={stages:[{length:8,items:1,n_examples:64,batch_size:16}],"
        "tests:[{length:8,items:1,n_examples:20}]}",
        "widths=[16]", "learning_rates=[1e-3,1e-2,3e-3]", "seeds=[0,1]", "device=cpu",
        "models.mamba2_n16.mixers.M.headdim=16", *more,
    ]  # fmt: skip


def sweep_inside(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep", *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def files_by_name(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / "cells").iterdir())]


def test_a_sweep_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    more = "+models.mamba2_n16.mixers.M.headdim=16"
    given = [a for a in arguments(folder) if "headdim" not in a] + [more]
    assert sweep_inside(monkeypatch, *given, "seeds=[0]") == 0
    cells = sorted((folder / "cells").iterdir())
    assert [cell.name for cell in cells] == [
        f"T-mamba2_n16-d16-lr{rate}-s0.json" for rate in ("1.00e-02", "1.00e-03", "3.00e-03")
    ]
    before = {cell: cell.stat().st_mtime_ns for cell in cells}
    capsys.readouterr()
    assert sweep_inside(monkeypatch, *given, "budget_s=0") == 0
    assert {cell: cell.stat().st_mtime_ns for cell in cells} == before
    assert "Best over learning rates (3 cells)" in capsys.readouterr().out
    assert sweep_inside(monkeypatch, *given) == 0
    assert len(list((folder / "cells").iterdir())) == 6
    assert {cell: cell.stat().st_mtime_ns for cell in cells} == before
    summary = json.loads((folder / "summary.json").read_text())
    [point] = summary["points"]
    files = [json.loads(f.read_text()) for f in (folder / "cells").iterdir()]
    for seed in (0, 1):
        best = max(f["tests"][0]["accuracy"] for f in files if f["seed"] == seed)
        assert point["accuracies"][seed] == best
    assert point["cells"] == 6
    assert summary["published"]
    assert [c["learning_rate"] for c in summary["cells"]] == [1e-2, 1e-2, 1e-3, 1e-3, 3e-3, 3e-3]
    assert summary["cells"][0]["curve"] == files_by_name(folder)[0]["curve"]
    assert summary["models"]["mamba2_n16"]["mixers"]["M"] == {"d_state": 16, "headdim": 16}
    assert [e["torch"] for e in summary["environments"]] == [torch.__version__]
    assert (folder / "accuracy.png").stat().st_size > 5000
    assert "| T |" in (folder / "summary.md").read_text()
    assert files[0]["environment"]["torch"] == torch.__version__

    # Neither another task nor another model under the same name is mixed in.
    assert sweep_inside(monkeypatch, *given, "weight_decay=0.2") == 2
    assert "holds a sweep with another weight_decay" in capsys.readouterr().err
    assert sweep_inside(monkeypatch, *given, "models.mamba2_n16.mixers.M.d_state=8") == 2
    assert "was made with another model_config" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^output='.*file': is a file"):
        command.open_folder(tmp_path / "file", config(output=str(tmp_path / "file")))


def test_solved_questions_leave_out_other_rates(tmp_path: Path) -> None:
    sweep = config(stop_at=0.0, skip_solved=True, learning_rates=[2e-3, 1e-3, 4e-3], seeds=[0, 1])
    command.open_folder(tmp_path / "s", sweep)
    command.run_cells(sweep, tmp_path / "s", CPU)
    names = sorted(file.name for file in (tmp_path / "s" / "cells").iterdir())
    assert names == ["T-m-d16-lr2.00e-03-s0.json", "T-m-d16-lr2.00e-03-s1.json"]


def test_processes_that_share_a_folder_train_every_cell_once(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    given = [a for a in arguments(folder) if "headdim" not in a]
    given.append("+models.mamba2_n16.mixers.M.headdim=16")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "eval.sweep", *given],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    logs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    ended = [line.split()[1] for log in logs for line in log.splitlines() if " of 4 steps" in line]
    names = sorted(file.stem for file in (folder / "cells").iterdir())
    assert sorted(name.rstrip(":") for name in ended) == names
    assert len(names) == 6
    assert len(json.loads((folder / "summary.json").read_text())["cells"]) == 6


def test_a_cell_that_another_process_trains_is_left_to_it(tmp_path: Path) -> None:
    sweep = config(learning_rates=[1e-3, 2e-3], stop_at=0.0, skip_solved=True)
    command.open_folder(tmp_path, sweep)
    cells = tmp_path / "cells"
    [first, second] = command.specs(sweep)
    lock = cells / f"{first.name}.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib, time; from eval.sweep.claim import Claim;"
         "kept = Claim.take(pathlib.Path(sys.argv[1])); print(kept is not None, flush=True);"
         "time.sleep(99)", str(lock)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    results = command.Results(sweep, cells)
    results.read(first)
    assert not results.solved(first)
    command.run_cells(sweep, tmp_path, CPU)
    assert sorted(file.name for file in cells.iterdir()) == [lock.name, f"{second.name}.json"]
    results.read(first)  # what another process found counts here
    assert results.solved(first)

    holder.kill()  # which frees the cell, although the file is still there
    holder.wait()
    sweep.skip_solved = False
    command.run_cells(sweep, tmp_path, CPU)
    names = sorted([f"{first.name}.json", f"{second.name}.json"])
    assert sorted(file.name for file in cells.iterdir()) == names


def test_time_that_is_up_leaves_cells_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = config(budget_s=10.0)
    clock = iter([0.0, 1.0, *[2.0] * 8, *[11.0] * 99])  # began, then each look
    command.open_folder(tmp_path / "s", sweep)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_TURN", 1)
        patch.setattr(command.time, "perf_counter", lambda: next(clock))
        command.run_cells(sweep, tmp_path / "s", CPU)
    [file] = (tmp_path / "s" / "cells").iterdir()
    assert file.suffix == ".unfinished"
    sweep.budget_s = None
    command.run_cells(sweep, tmp_path / "s", CPU)
    names = {file.suffix for file in (tmp_path / "s" / "cells").iterdir()}
    assert names == {".json"}


def test_the_best_rate_of_each_seed() -> None:
    def cell(model: str, rate: float, seed: int, accuracy: float | None) -> dict[str, Any]:
        test = {"length": 64, "items": 4, "accuracy": accuracy}
        return {"dataset": "T", "model": model, "width": 32, "learning_rate": rate, "seed": seed,
                "tests": [test]}  # fmt: skip

    cells = [
        cell("a", 1e-3, 0, 0.2), cell("a", 1e-2, 0, 0.8), cell("a", 1e-3, 1, 0.6),
        cell("a", 1e-2, 1, 0.4), cell("b", 1e-3, 0, None), cell("gone", 1e-3, 0, 1.0),
    ]  # fmt: skip
    [point] = best_points(cells, ["b", "a"])
    assert (point.model, point.accuracies, point.learning_rates) == ("a", [0.8, 0.6], [1e-2, 1e-3])
    assert point.accuracy == pytest.approx(0.7)
    assert point.cells == 4


def test_a_line_over_lengths_is_one_model() -> None:
    # The first rate is best at the longest length, the second at all together.
    cells = [
        {"dataset": "T", "model": "a", "width": 32, "learning_rate": rate, "seed": 0,
         "tests": [{"length": n, "items": 4, "accuracy": reached}
                   for n, reached in zip((64, 128, 256, 512), of_rate, strict=True)]}
        for rate, of_rate in ((1e-3, (0.5, 0.5, 0.9, None)), (1e-2, (1.0, 1.0, 0.6, None)))
    ]  # fmt: skip
    points = best_points(cells, ["a"])
    assert [(p.length, p.accuracies, p.cells) for p in points] == [
        (64, [1.0], 2), (128, [1.0], 2), (256, [0.6], 2)
    ]  # fmt: skip
    assert {rate for p in points for rate in p.learning_rates} == {1e-2}


def test_a_cell_reports_its_best_evaluation() -> None:
    cell = cell_of(config())
    rows = [[0.9, 0.2, None], [0.8, 0.7, None], [0.1, 0.9, None]]
    cell.curve = [{"step": 4 * i, "loss": 1.0, "accuracy": row} for i, row in enumerate(rows)]
    cell.shapes.tests.append(cell.shapes.tests[0])
    found = cell.result()
    assert [test["accuracy"] for test in found["tests"]] == [0.8, 0.7, None]
    assert found["best_step"] == 4
    cell.curve = []
    assert [test["accuracy"] for test in cell.result()["tests"]] == [None] * 3
    assert cell.result()["best_step"] is None


PRESETS = sorted(file.stem for file in (CONFIGS / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str, tmp_path: Path) -> None:
    ConfigStore.instance().store(name="sweep_schema", node=SweepConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        sweep = typed(compose("sweep", [f"sweep={name}"]), SweepConfig)
    sweep.validate()
    assert len(sweep.learning_rates) * len(sweep.seeds) >= 6
    if name.startswith("recall"):
        assert len(sweep.learning_rates) >= 7
        assert sweep.task is SweepTask.recall
    lengths = {t.length for data in sweep.datasets.values() for t in data.tests}
    if name == "recall_based":
        assert lengths == {64, 128, 256, 512, 1024}
    if name == "recall_zoology":
        assert set(sweep.datasets) == {"T64", "T128", "T256", "T512"}
    if name == "induction":
        assert max(lengths) == 2**20
        assert min(lengths) == 2**6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, r"^models={}: is empty"),
        ({"models": {"m": {"patern": "M"}}}, r"^models\.m\.patern=.*Did you mean 'pattern'"),
        ({"models": {"m": {"pattern": "Q"}}}, r"letter 'Q' is not defined"),
        ({"learning_rates": [0.0]}, r"^learning_rates=\[0.0\]: must be positive"),
        ({"datasets": {"T": {"stages": [], "tests": TESTS}}}, r"^datasets\.T='': needs stages"),
        (
            {"datasets": {"T": {"stages": [{"items": 99}], "tests": TESTS}}},
            r"^datasets\.T\.stages\[0\]\.n_pairs=99: .* use 1 to 64 for length 256",
        ),
        ({"budget_s": -1.0}, r"^budget_s=-1.0"),
        ({"models": {"m": {"embedding_std": 0.0}}}, r"^model\.embedding_std=0.0: must be > 0"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_curves_by_length_are_drawn(tmp_path: Path) -> None:
    cells = [
        {"dataset": "T256", "model": "m", "width": w, "learning_rate": 1e-3, "seed": 0,
         "tests": [{"length": n, "items": 16, "accuracy": 0.5} for n in (64, 128)]}
        for w in (32, 64)
    ]  # fmt: skip
    draw(best_points(cells, ["m"]), tmp_path / "figure.png", by_length=True)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M", "A", "S"])
def test_graphs_take_the_same_steps(pattern: str) -> None:
    models = {"m": {"pattern": pattern, "mixers": {"A": {"n_heads": 1}}}}
    curves = []
    for graphs in (False, True):
        sweep = config(
            graphs=graphs, models=models, evaluate_every=1, widths=[32],
            datasets={"T": {"stages": [{**STAGES[0], "epochs": 8}, STAGES[1]], "tests": TESTS}},
        )  # fmt: skip
        curves.append(run(cell_of(sweep, torch.device("cuda"), width=32)).curve)
    torch.cuda.synchronize()
    for eager, graphed in zip(*curves, strict=True):
        assert graphed["loss"] == pytest.approx(eager["loss"], rel=1e-3)
