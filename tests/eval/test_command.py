"""``python -m eval`` as a user runs it, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import eval.__main__ as command
from eval import PerplexityConfig, RecallEvalConfig, evaluate_perplexity, evaluate_recall
from eval.report import default_output, step_of
from mamba2lm.inference import load_run
from mamba2lm.models.checkpoint import verify
from tests.inference import helpers
from tests.processes import run_program

TEXT = helpers.corpus()[20_000:22_000]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    data = {
        "sources": [str(tmp_path / "own.txt")],
        "validation_fraction": 0.5,
        "cache_dir": str(tmp_path / "cache"),
    }
    return helpers.write_run(
        tmp_path / "run", helpers.model("MSWF"), helpers.tokenizer(), data=data
    )


def test_both_tasks_from_the_shell(run_dir: Path) -> None:
    done = run_program(
        "-m", "eval", f"checkpoint={run_dir}", "tasks=[perplexity,recall]",
        "recall.length=32", "recall.n_pairs=[2,4]", "recall.n_examples=6", "seed=9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    values = json.loads((run_dir / "eval-7.json").read_text(encoding="utf-8"))
    run = load_run(run_dir)
    assert run.tokenizer is not None

    found = values["results"]["perplexity"]
    # From the end of a paragraph before the middle.
    assert len(TEXT) / 2 <= found["bytes"] < 0.75 * len(TEXT)
    held_out = TEXT.encode()[-found["bytes"] :].decode()
    expected = evaluate_perplexity(
        run.model, run.tokenizer, [held_out], PerplexityConfig(), length=24
    )
    assert found["text_sha256"] == expected.text_sha256
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert found["token_perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-4)
    assert (found["window"], found["length"], found["stride"]) == ("disjoint", 24, 24)

    config = RecallEvalConfig(length=32, n_pairs=[2, 4], n_examples=6)
    recall = evaluate_recall(run.model, config, seed=9)
    assert [r["correct"] for r in values["results"]["recall"]] == [r.correct for r in recall]
    assert [r["questions"] for r in values["results"]["recall"]] == [12, 24]

    assert values["step"] == 7
    assert values["checkpoint"] == str(run.folder.resolve())
    assert values["model"]["fingerprint"] == run.fingerprint
    assert values["config"]["seed"] == 9
    assert values["config"]["perplexity"]["window"] == "disjoint"
    assert set(values["seconds"]) == {"perplexity", "recall"}
    assert values["environment"]["dtype"] == "float32"
    table = done.stdout.decode()
    assert f"{expected.bits_per_byte:.4f}" in table
    assert "disjoint windows of 24" in table
    assert "Associative recall (length 32, 500 ids)" in table
    verify(run.folder)


def run_inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_other_text_and_a_named_output(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other.txt").write_text("One. Two three.", encoding="utf-8")
    output = tmp_path / "other.json"
    code, out, err = run_inside(
        monkeypatch, capsys, f"checkpoint={run_dir}", f"output={output}",
        f"perplexity.sources=[{tmp_path / 'other.txt'}]", "perplexity.window=streaming",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(output.read_text(encoding="utf-8"))["results"]["perplexity"]
    assert (found["words"], found["bytes"], found["window"]) == (3, 15, "streaming")
    assert found["stride"] is None
    assert "streaming, 24 tokens at once" in out
    assert not (run_dir / "eval-7.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[perplexty]"], "tasks='perplexty': no such task. Did you mean 'perplexity'?"),
        (["tasks=[]"], "tasks=[]: is empty; known: perplexity, length, recall"),
        (["perplexity.window=sliding"], "perplexity.window="),
        (["perplexity.sources=[none.txt]"], "perplexity.sources[0].path='none.txt': no such file"),
        (["perplexity.stride=3"], "perplexity.stride=3: means nothing with window=disjoint"),
        (["output=no/where.json"], "output='no/where.json': give a file name in a folder"),
        (["checkpoint=none"], "checkpoint='none': no such folder"),
    ],
)
def test_mistakes_name_key_value_and_remedy(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(run_dir.rglob("*"))
    if not any(argument.startswith("checkpoint=") for argument in arguments):
        arguments = [f"checkpoint={run_dir}", *arguments]
    code, out, err = run_inside(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if "evaluating" not in line]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert sorted(run_dir.rglob("*")) == before


def test_a_synthetic_run_has_no_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = helpers.write_run(tmp_path / "run", helpers.model("MM"), None)
    code, _, err = run_inside(monkeypatch, capsys, f"checkpoint={folder}")
    assert code == 2
    assert "use tasks=[recall]" in err


def test_output_is_never_inside_a_checkpoint_nor_over_another(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000120"
    alone = tmp_path / "downloaded"
    for folder in (checkpoint, alone):
        folder.mkdir(parents=True)
    assert default_output(checkpoint) == tmp_path / "run" / "eval-120.json"
    (tmp_path / "run" / "eval-120.json").write_text("{}")
    assert default_output(checkpoint) == tmp_path / "run" / "eval-120.2.json"
    assert default_output(alone) == tmp_path / "eval-downloaded.json"
    downloaded = tmp_path / "models--team--tiny" / "snapshots" / "0123abcd"
    assert default_output(downloaded) == Path.cwd() / "eval-team--tiny.json"
    assert step_of(alone) is None
