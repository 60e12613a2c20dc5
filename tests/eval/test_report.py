"""Several runs in one report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import eval.__main__ as command
from eval.report import run_names, write, write_report
from eval.result import Curve, Grid, TaskResult
from tests.inference import helpers


def run_inside(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(helpers.corpus()[5000:7000], encoding="utf-8")
    runs = [
        helpers.write_run(tmp_path / name, helpers.model(pattern), helpers.tokenizer(), step=step)
        for name, pattern, step in (("plain", "MM", 3), ("mixed", "MSWF", 9))
    ]
    report = tmp_path / "report"
    code = run_inside(
        monkeypatch, f"checkpoints=[{runs[0]},{runs[1]}]",
        "tasks=[perplexity,length,recall,last_word]",
        f"perplexity.sources=[{tmp_path / 'text.txt'}]", f"report={report}",
        f"length.sources=[{tmp_path / 'text.txt'}]", "length.multiples=[1,4]",
        f"last_word.sources=[{tmp_path / 'text.txt'}]", "last_word.preset=lambada",
        "recall.preset=fast", "recall.n_examples=1", "perplexity.length=20",
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = json.loads((report / "report.json").read_text())["runs"]
    assert list(found) == ["plain at 3", "mixed at 9"]
    for run, name in zip(runs, found, strict=True):
        alone = json.loads(next(run.glob("eval-*.json")).read_text())
        assert alone == found[name]
        assert alone["config"]["perplexity"]["length"] == 20
        assert alone["published"]["last_word"][0]["model"] == "Mamba 130M"
    text = (report / "report.md").read_text()
    bits = [f"{r['results']['perplexity']['bits_per_byte']:.4f}" for r in found.values()]
    assert f"| bits per byte (disjoint) | {bits[0]} | {bits[1]} |" in text
    assert "| figure | plain at 3 | mixed at 9 |" in text
    assert "mostly below 0.5" in text
    for figure in ("loss-by-context-disjoint-windows", "loss-beyond-the-training-length",
                   "associative-recall"):  # fmt: skip
        assert (report / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({figure}.png)" in text
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert bits[0] in page
    assert bits[1] in page


ROWS = [
    {"step": 1, "tokens": 100, "loss": 5.0, "tokens_per_second": 10.0, "mfu": 0.1,
     "memory_bytes": 2**30, "seconds": 10.0},
    {"step": 2, "tokens": 200, "loss": 4.0, "tokens_per_second": 50_000.0, "mfu": 0.3,
     "memory_bytes": 3 * 2**30, "seconds": 12.0},
    {"step": 2, "tokens": 200, "val_loss": 4.5, "val_perplexity": 90.0, "val_bits_per_byte": 1.5},
    {"step": 3, "tokens": 300, "loss": None, "tokens_per_second": 30_000.0, "mfu": 0.2,
     "memory_bytes": 2**30, "seconds": 13.0},
    {"step": 3, "tokens": 300, "val_loss": 4.75, "val_perplexity": 115.0, "val_bits_per_byte": 1.6},
    {"step": 4, "tokens": 400, "loss": 1.0, "tokens_per_second": 9e9, "mfu": 0.9,
     "memory_bytes": 2**40, "seconds": 99.0},
]  # fmt: skip


def test_training_is_compared_up_to_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        helpers.write_run(tmp_path / name, helpers.model("M"), helpers.tokenizer(), step=step)
        for name, step in (("a", 3), ("b", 2))
    ]
    for run in runs:
        lines = [json.dumps(row) for row in ROWS]
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "tok')
    report = tmp_path / "report"
    given = (f"checkpoints=[{runs[0]},{runs[1]}]", "tasks=[training]", f"report={report}")
    assert run_inside(monkeypatch, *given) == 0
    found = json.loads((report / "report.json").read_text())["runs"]
    a, b = (run["results"]["training"] for run in found.values())
    # The median without the first row, which is slow for other reasons; 50,000 and 30,000 of a.
    assert (a["tokens_per_second"], b["tokens_per_second"]) == (40_000.0, 50_000.0)
    assert (a["mfu"], b["mfu"]) == pytest.approx((0.25, 0.3))
    assert a["memory_bytes"] == 3 * 2**30
    assert (a["steps"], a["tokens"], a["seconds"]) == (3, 300, 13.0)
    assert a["curve"] == [[100, 5.0], [200, 4.0]]
    assert a["held_out"] == [[200, 4.5], [300, 4.75]]
    assert (a["best_held_out"], a["held_out_bits_per_byte"]) == (4.5, 1.6)
    assert b["held_out"] == [[200, 4.5]]
    text = (report / "report.md").read_text()
    assert "| tokens per second | 40,000 | 50,000 |" in text
    assert "| held-out bits per byte | 1.6000 | 1.5000 |" in text
    for figure in ("loss-in-training", "held-out-loss"):
        assert (report / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()

    (runs[0] / "metrics.jsonl").unlink()
    assert run_inside(monkeypatch, f"checkpoint={runs[0]}", "tasks=[training]") == 2
    assert "metrics.jsonl; leave this task out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "checkpoint=None: give checkpoint=… on the command line"),
        (("checkpoint=a", "checkpoints=[b]"), "checkpoint='a': give checkpoint=…"),
        (("checkpoints=[a]", "output=x.json"), "output='x.json': is one run's file"),
        (("checkpoints=[none]",), "checkpoints='none': no such folder"),
        (("checkpoint=a", "tasks=[last_word]"), "last_word.sources=[]: name texts"),
        (("checkpoint=a", "tasks=[passkey]", "passkey.depths=[2]"), "passkey.depths=[2.0]"),
        (("checkpoint=a", "form=backwards"), "form="),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_inside(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_runs_have_different_names(tmp_path: Path) -> None:
    folders = [tmp_path / part / "run" / "checkpoints" / "step_00000004" for part in ("a", "b")]
    folders.append(tmp_path / "alone")
    assert run_names(folders) == ["run at 4 (1)", "run at 4 (2)", "alone"]


def test_what_no_number_is_stays_readable(tmp_path: Path) -> None:
    write({"a": [1.5, math.inf, {"b": math.nan}], "c": "x"}, tmp_path / "values.json")
    assert json.loads((tmp_path / "values.json").read_text()) == {
        "a": [1.5, None, {"b": None}], "c": "x",
    }  # fmt: skip


def test_a_task_that_one_run_lacks_leaves_a_gap(tmp_path: Path) -> None:
    def result(value: float) -> TaskResult:
        grid = Grid("T|x", ["a"], [["<b>"]])
        return TaskResult(
            {}, [grid], [Curve("F", "x", "loss", [1.0, 2.0], [value, 1.0])], {"v": value}
        )

    document = {
        "step": None, "model": {"pattern": "M", "parameters": 1, "fingerprint": "f" * 32},
        "environment": dict.fromkeys(
            ("date", "mamba2lm", "git_commit", "torch", "device", "dtype"), "?"
        ),
    }  # fmt: skip
    write_report(tmp_path, {"a": document, "b": document}, {"a": {"t": result(0.25)}, "b": {}})
    text = (tmp_path / "report.md").read_text()
    assert "| v | 0.2500 |  |" in text
    assert "&lt;b&gt;" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "f.png").is_file()
