"""Two processes that share a model write and measure what one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_program
from tests.training.helpers import run_here, text_file, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run of a model with every mixer, made by one process."""
    folder = tmp_path_factory.mktemp("generation")
    changes = [
        "training.max_steps=6", "model.pattern=MSAF", "model.n_layers=4",
        "training.sample_tokens=0",
        "model.mixers.A.n_heads=4", "model.mixers.A.n_kv_heads=1", "training.eval_every=0",
    ]  # fmt: skip
    assert run_here(tiny_run(text_file(folder), folder / "run", *changes)) == 0
    return folder / "run"


def output(*arguments: str, processes: int | None = None) -> str:
    done = run_program(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_same_text(run: Path) -> None:
    arguments = [
        "generate.py", f"checkpoint={run}", "prompt=The", "max_new_tokens=40", "seed=3",
        "samples=2",
    ]  # fmt: skip
    alone = output(*arguments)
    assert len(alone) > 40
    assert output(*arguments, processes=2) == alone


@pytest.mark.slow
def test_the_same_perplexity(run: Path, tmp_path: Path) -> None:
    figures = []
    for processes in (None, 2):
        target = tmp_path / f"{processes}.json"
        arguments = ["-m", "eval", f"checkpoint={run}", "tasks=[perplexity]", f"output={target}"]
        output(*arguments, "perplexity.max_tokens=400", processes=processes)
        figures.append(json.loads(target.read_text())["results"]["perplexity"]["nll"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_a_server_is_one_process(run: Path) -> None:
    pytest.importorskip("fastapi")
    done = run_program(
        "-m", "mamba2lm.inference.server", f"checkpoint={run}", environment={"WORLD_SIZE": "2"}
    )
    assert done.returncode == 2
    assert b"error: WORLD_SIZE=2: a server is one process" in done.stderr
