"""The command line: a mistake costs one line and writes nothing; help helps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mamba2lm.config import TrainConfig
from mamba2lm.schema import from_mapping
from tests.training.helpers import ROOT, finish, run_here, start, text_file, tiny_run, tree

# The changes to a command that works, and what its only line has to say.
MISTAKES = {
    "misspelt section": (["traning.max_steps=3"], ["traning.max_steps='3': no such key",
                         "Did you mean 'training'?"]),
    "misspelt key": (["training.max_step=3"], ["training.max_step='3': no such key",
                     "Did you mean 'max_steps'?", "batch_size"]),
    "misspelt key added": (["+training.max_step=3"], ["training.max_step=3: no such key",
                           "Did you mean 'max_steps'?"]),
    "misspelt key at the top": (["dryrun=true"], ["dryrun='true': no such key",
                                "Did you mean 'dry_run'?"]),
    "misspelt key of a mixer": (["model.mixers.M.d_stat=8"], ["model.mixers.M.d_stat='8'",
                                "Did you mean 'd_state'?"]),
    "misspelt key added to a mixer": (["+model.mixers.M.headim=8"], ["model.mixers.M.headim=8",
                                      "Did you mean 'headdim'?"]),
    "new letter without a plus": (["model.mixers.Z.type=mamba2"], ["model.mixers.Z.type='mamba2'",
                                  "+model.mixers.Z.type=mamba2"]),
    "wrong type": (["training.max_steps=ten"], ["training.max_steps='ten'",
                   "could not be converted to Integer"]),
    "fraction for a whole": (["training.max_steps=1.5"], ["training.max_steps='1.5'", "Integer"]),
    "wrong type in a mixer": (["model.mixers.M.d_state=many"], ["model.mixers.M.d_state='many'",
                              "Integer"]),
    "unknown choice": (["optimizer.kind=sgd"], ["optimizer.kind='sgd'", "[adamw, muon]"]),
    "unknown experiment": (["experiment=quickstrat"], ["experiment='quickstrat'",
                           "Did you mean 'quickstart'?"]),
    "unknown model": (["model=mamba2_131m"], ["model='mamba2_131m'", "mamba2_130m"]),
    "no value": (["resume"], ["resume", "missing EQUAL"]),
    "what Hydra cannot read": (["run_dir=a+(b"], ["run_dir='a+(b'", """'run_dir="a+(b"'"""]),
    "unknown letter": (["model.pattern=MX"], ["model.pattern='MX'", "letter 'X'",
                       "A, F, L, M, S"]),
    "empty pattern": (["model.pattern="], ["model.pattern=''", "at least one letter"]),
    "unknown mixer": (["+model.mixers.Z.type=mamba9", "model.pattern=Z"],
                      ["model.mixers.Z.type='mamba9'", "Did you mean 'mamba2'?"]),
    "heads that do not divide": (["model.mixers.M.headdim=48"], ["model.mixers.M.headdim=48",
                                 "expand·d_model = 128"]),
    "groups that do not divide": (["model.mixers.M.ngroups=3"], ["model.mixers.M.ngroups=3",
                                  "heads, 8"]),
    "layers that are no multiple": (["model.pattern=MMA", "model.n_layers=4"],
                                    ["model.n_layers=4", "multiple of the 3 letters"]),
    "missing corpus": (["data.sources=[nowhere.txt]"], ["data.sources[0].path='nowhere.txt'",
                       "no such file or folder"]),
    "no corpus": (["data.sources=[]"], ["data.sources=[]", "at least one source"]),
    "empty corpus": (["data.sources=[EMPTY]"], ["empty.txt", "no text in it"]),
    "short corpus": (["data.sources=[SHORT]"], ["short.txt", "128"]),
    "vocabulary too small": (["model.vocab_size=100"], ["model.vocab_size=100", "257"]),
    "tensor parallelism": (["parallel.tensor=2"], ["parallel.tensor=2", "start 2 or a multiple"]),
    "batch that does not divide": (["training.batch_size=6", "training.micro_batch_size=4"],
                                   ["training.micro_batch_size=4", "must divide"]),
    "nothing to resume": (["resume=runs/that/never/was"], ["resume='runs/that/never/was'",
                          "no such folder"]),
    "negative rate": (["optimizer.learning_rate=-1"], ["optimizer.learning_rate=-1",
                      "must be positive"]),
    "impossible schedule": (["schedule.min_ratio=2"], ["schedule.min_ratio=2", "[0, 1]"]),
    "neither true nor false": (["training.cuda_graph=maybe"], ["training.cuda_graph='maybe'",
                               "use true or false"]),
    "no steps": (["training.max_steps=0"], ["training.max_steps=0", "≥ 1"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line(
    mistake: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes, says = MISTAKES[mistake]
    text = text_file(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    changes = [
        change.replace("EMPTY", str(tmp_path / "empty.txt")).replace(
            "SHORT", str(tmp_path / "short.txt")
        )
        for change in changes
    ]
    given = {change.split("=")[0] for change in changes}
    arguments = [
        argument
        for argument in tiny_run(text, tmp_path / "run")
        if argument.split("=")[0] not in given
        and not (argument == "~experiment" and "experiment" in given)
    ]
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert run_here([*arguments, *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    # Only reading a corpus may be told before what is wrong with it.
    *earlier, line = captured.err.splitlines()
    assert all("tokenised" in other for other in earlier), captured.err
    assert line.startswith("error: ")
    for part in says:
        assert part in line
    assert tree(tmp_path) == before


def test_nothing_stays_of_a_run_that_is_refused_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny_run(text_file(tmp_path), tmp_path / "run")
    grows = ["model.pattern=MA", "training.carry_state=true"]
    assert run_here([*(a for a in arguments if "model.pattern" not in a), *grows]) == 2
    message = "error: training.carry_state=True: the model's attention keeps every token"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_mistake_as_a_process(tmp_path: Path) -> None:
    arguments = [*tiny_run(text_file(tmp_path), tmp_path / "run"), "model.mixers.M.headdim=48"]
    before = tree(tmp_path)
    stderr = finish(start(arguments), code=2)
    assert stderr == (
        "error: model.mixers.M.headdim=48: must divide the inner width expand·d_model = 128; "
        "change headdim, expand or model.d_model.\n"
    )
    assert tree(tmp_path) == before


def test_an_error_of_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("train.prepare_data", broken)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_run(text_file(tmp_path), tmp_path / "r")])
    import train

    with pytest.raises(RuntimeError, match="a bug"):
        train.main()


def test_help_names_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: python train.py [group=option ...] [key=value ...]")
    data = "data: austen, bytes, induction, local, recall, selective_copying"
    for line in (data, "optimizer: adamw, muon"):
        assert line in out
    for key in ("run_dir:", "resume: auto", "dry_run: false", "pattern:", "d_model:", "n_layers:",
                "sources:", "sequence_length:", "max_steps:", "batch_size:", "tensor: 1",
                "learning_rate:", "warmup_steps:"):  # fmt: skip
        assert key in out, key
    assert "Powered by Hydra" not in out
    assert "hydra:" not in out


def test_cfg_job_prints_the_configuration_that_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_run(tmp_path / "a.txt", tmp_path / "run"), "--cfg", "job"]
    assert run_here(arguments) == 0
    out = capsys.readouterr().out
    config = from_mapping(TrainConfig, OmegaConf.create(out), "")
    assert config.training.max_steps == 40
    assert config.model.d_model == 64
    assert config.data.sources == [str(tmp_path / "a.txt")]
    assert config.run_dir == str(tmp_path / "run")
    config.validate()
    assert not (tmp_path / "run").exists()


def test_the_module_needs_no_working_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "job"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout).run_dir == "runs/quickstart"
    assert list(tmp_path.iterdir()) == []
