"""What may start where: a run is never overwritten, and goes on only as itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mamba2lm.models.checkpoint import WEIGHTS
from mamba2lm.schema import ConfigError
from mamba2lm.training.run_folder import RunFolder, check_same_run, open_run
from tests.training.helpers import make_trainer, text_corpus, tiny_config, tree


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_trainer(tmp_path / "run", text_corpus(tmp_path), max_steps=4, save_every=2).fit()
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def damage(checkpoint: Path) -> None:
    weights = checkpoint / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_starts_from_nothing(tmp_path: Path, resume: str) -> None:
    opened = open_run(str(tmp_path / "new"), resume)
    assert opened == RunFolder(tmp_path / "new", None)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert open_run(str(tmp_path / "empty"), resume).resume_from is None


def test_auto_goes_on_from_the_newest_whole_checkpoint(run: Path) -> None:
    before = tree(run)
    assert open_run(str(run), "auto").resume_from == step(run, 4)
    damage(step(run, 4))
    assert open_run(str(run), "auto").resume_from == step(run, 2)
    damage(step(run, 2))
    with pytest.raises(ConfigError, match="every checkpoint in it is damaged"):
        open_run(str(run), "auto")
    assert tree(run).keys() == before.keys()


def test_never_refuses_a_run(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir=.*holds a run; choose another"):
        open_run(str(run), "never")


def test_folders_of_other_things_are_refused(tmp_path: Path, run: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("name: another program\n")
    for resume in ("auto", "never", str(run)):
        with pytest.raises(ConfigError, match=r"run_dir=.*other things"):
            open_run(str(tmp_path / "mine"), resume)
        with pytest.raises(ConfigError, match=r"run_dir=.*other things"):
            open_run(str(tmp_path / "project"), resume)
        with pytest.raises(ConfigError, match=r"run_dir=.*is a file"):
            open_run(str(tmp_path / "file"), resume)


def test_a_path_is_a_run_or_a_checkpoint(run: Path, tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    assert open_run(new, str(run)) == RunFolder(Path(new), step(run, 4))
    assert open_run(new, str(step(run, 2))).resume_from == step(run, 2)
    damage(step(run, 2))
    with pytest.raises(ConfigError, match=rf"resume=.*damaged.*{WEIGHTS} has .* bytes instead"):
        open_run(new, str(step(run, 2)))
    with pytest.raises(ConfigError, match=r"resume='nowhere': no such folder"):
        open_run(new, "nowhere")
    with pytest.raises(ConfigError, match=r"resume=.*no checkpoint in it"):
        open_run(new, str(tmp_path / "cache"))


def test_a_path_may_not_replace_another_run_or_later_steps(run: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path / "other", text_corpus(tmp_path), max_steps=2).fit()
    with pytest.raises(ConfigError, match=r"run_dir=.*holds another run than resume="):
        open_run(str(tmp_path / "other"), str(run))
    with pytest.raises(ConfigError, match=r"run_dir=.*holds later steps than resume="):
        open_run(str(run), str(step(run, 2)))
    assert open_run(str(run), str(step(run, 4))).resume_from == step(run, 4)


def test_a_run_without_a_checkpoint_starts_over(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (2, 4):
        step(run, number).rename(step(run, number).with_suffix(".partial"))
    before = tree(run)
    assert open_run(str(run), "auto").resume_from is None
    assert "starting it over" in caplog.text
    assert tree(run) == before, "opening wrote something"
    trainer = make_trainer(run, text_corpus(run.parent), max_steps=3)
    trainer.fit()
    assert [line[:10] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        '{"step": 1', '{"step": 2', '{"step": 3',
    ]  # fmt: skip


def resolved(**changes: Any) -> dict[str, Any]:
    return {
        "model": tiny_config(**changes).resolved(),
        "data": {"sources": ["a.txt"], "sequence_length": 32, "tokenizer": {"kind": "bytes"}},
        "optimizer": {"kind": "adamw", "learning_rate": 0.1},
        "training": {"max_steps": 5},
    }


def edited(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    *parents, last = key.split(".")
    node = config
    for name in parents:
        node = node[name]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("model.d_model", 64, "32"),
        ("model.mixers.M.d_state", 32, "16"),
        ("model.tie_embeddings", False, "True"),
        ("data.sources", ["b.txt"], r"\['a.txt'\]"),
        ("data.sequence_length", 64, "32"),
        ("data.tokenizer.kind", "bpe", "'bytes'"),
        ("optimizer.kind", "muon", "'adamw'"),
    ],
)
def test_what_makes_a_run_itself_cannot_change(
    tmp_path: Path, key: str, value: object, old: str
) -> None:
    own = RunFolder(tmp_path, tmp_path / "checkpoints" / "step_00000001")
    RunFolder(own.resume_from).write_config(resolved())  # type: ignore[arg-type]
    check_same_run(own, resolved())
    with pytest.raises(ConfigError) as caught:
        check_same_run(own, edited(resolved(), key, value))
    assert caught.value.key == key
    assert f"has {old.replace(chr(92), '')}; give that, or another run_dir" in str(caught.value)
    assert str(value) in str(caught.value)


def test_the_rest_may_change_and_another_run_may_take_other_data(tmp_path: Path) -> None:
    own = RunFolder(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000001")
    RunFolder(own.resume_from).write_config(resolved())  # type: ignore[arg-type]
    check_same_run(own, edited(resolved(), "optimizer.learning_rate", 0.5))
    check_same_run(own, edited(resolved(), "training.max_steps", 50))
    branch = RunFolder(tmp_path / "branch", own.resume_from)
    check_same_run(branch, edited(resolved(), "data.sources", ["b.txt"]))
    with pytest.raises(ConfigError, match=r"model\.d_model=64"):
        check_same_run(branch, resolved(d_model=64))
