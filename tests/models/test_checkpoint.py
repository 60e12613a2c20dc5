"""Checkpoints appear whole or not at all, damage shows, and nothing on disk is ever executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mamba2lm.models import LanguageModel
from mamba2lm.models.checkpoint import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    checkpoint_path,
    checkpoints_of,
    load_model,
    load_weights,
    newest_valid,
    point,
    pointed,
    read_config,
    resolve,
    save_weights,
    verify,
    write_checkpoint,
)
from mamba2lm.schema import ConfigError
from tests.models.small import small_model, tokens


def write(folder: Path, model: LanguageModel) -> Path:
    """Write a checkpoint with weights, configuration and a nested file."""

    def fill(partial: Path) -> None:
        save_weights(model, partial)
        config = OmegaConf.to_yaml({"model": model.config.resolved()})
        (partial / CONFIG).write_text(config, encoding="utf-8")
        (partial / "tokenizer").mkdir()
        (partial / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")

    write_checkpoint(folder, fill)
    return folder


def a_run(tmp_path: Path, *steps: int) -> list[Path]:
    """Write one checkpoint a step, of models with different seeds."""
    return [write(checkpoint_path(tmp_path, s), small_model("MA", seed=s)) for s in steps]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    model = small_model("MSAF")
    folder = write(tmp_path / "step_00000001", model)
    verify(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [CONFIG, MANIFEST, WEIGHTS, "tokenizer"]
    )
    loaded = load_model(folder)
    assert loaded.fingerprint() == model.fingerprint()
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.embedding.weight
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


def test_an_untied_head_is_kept_too(tmp_path: Path) -> None:
    model = small_model("M", tie_embeddings=False)
    loaded = load_model(write(tmp_path / "step_00000001", model))
    assert loaded.lm_head.weight is not loaded.embedding.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_model_loads_in_bf16_with_its_float32_parameters(tmp_path: Path) -> None:
    model = small_model("MS")
    loaded = load_model(write(tmp_path / "step_00000001", model), dtype=torch.bfloat16)
    expected = small_model("MS").cast(torch.bfloat16)
    assert loaded.fingerprint() == expected.fingerprint()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}


def test_a_failed_write_leaves_no_checkpoint_and_no_obstacle(tmp_path: Path) -> None:
    folder = checkpoint_path(tmp_path, 7)

    def broken(partial: Path) -> None:
        (partial / "half").write_bytes(b"half a file")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_checkpoint(folder, broken)
    assert not folder.exists()
    assert checkpoints_of(tmp_path) == []
    assert newest_valid(tmp_path) is None
    write(folder, small_model("MA"))
    verify(folder)
    assert not (folder / "half").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def damage_truncated(folder: Path) -> str:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return f"{WEIGHTS} has .* bytes instead of"


def damage_flipped(folder: Path) -> str:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    return f"{WEIGHTS} has changed"


def damage_missing(folder: Path) -> str:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def damage_no_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return f"{MANIFEST} is missing or unreadable"


def damage_cut_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
    return f"{MANIFEST} is missing or unreadable"


def damage_foreign_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("{}")
    return f"{MANIFEST} is missing or unreadable"


DAMAGES = [
    damage_truncated,
    damage_flipped,
    damage_missing,
    damage_no_manifest,
    damage_cut_manifest,
    damage_foreign_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_passed_over(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = a_run(tmp_path, 1, 2, 3)
    message = damage(third)
    with pytest.raises(CheckpointError, match=message):
        verify(third)
    with pytest.raises(ConfigError, match=f"checkpoint is damaged: .*{message}"):
        resolve(third, "checkpoint")
    with caplog.at_level("WARNING"):
        assert newest_valid(tmp_path) == second
    assert third.name in caplog.text
    assert resolve(tmp_path, "checkpoint") == second
    damage(second)
    damage(first)
    assert newest_valid(tmp_path) is None
    with pytest.raises(ConfigError, match=r"^resume=.*all 3 checkpoints in it are damaged"):
        resolve(tmp_path, "resume")


def test_every_file_is_in_the_manifest(tmp_path: Path) -> None:
    (folder,) = a_run(tmp_path, 1)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(files) == {WEIGHTS, CONFIG, "tokenizer/tokenizer.json"}
    for name, entry in files.items():
        assert entry["bytes"] == (folder / name).stat().st_size


def test_the_newest_checkpoint_is_by_step_and_leftovers_are_not_checkpoints(tmp_path: Path) -> None:
    written = a_run(tmp_path, 900, 20, 1000)
    for leftover in ("step_00002000.partial", "step_00003000.deleting"):
        (tmp_path / "checkpoints" / leftover).mkdir()
    point(tmp_path, "latest", written[0])
    assert [path.name for path in checkpoints_of(tmp_path)] == [
        "step_00000020",
        "step_00000900",
        "step_00001000",
    ]
    assert resolve(tmp_path, "checkpoint") == written[2]
    assert resolve(str(written[1]), "checkpoint") == written[1]


def test_pointers_name_checkpoints(tmp_path: Path) -> None:
    first, second = a_run(tmp_path, 1, 2)
    assert pointed(tmp_path, "best") is None
    point(tmp_path, "best", first)
    assert pointed(tmp_path, "best") == first
    point(tmp_path, "best", second)
    assert pointed(tmp_path, "best") == second
    second.rename(tmp_path / "elsewhere")
    assert pointed(tmp_path, "best") is None


def test_nothing_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint='.*/none': no such folder"):
        resolve(tmp_path / "none", "checkpoint")
    with pytest.raises(ConfigError, match=r"^checkpoint=.*no checkpoint in it"):
        resolve(tmp_path, "checkpoint")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="give a run folder or a checkpoint"):
        resolve(tmp_path / "file", "checkpoint")


class Exploit:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_hostile_pickle_is_refused_and_never_runs(how: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    model = small_model("M")

    def fill(partial: Path) -> None:
        config = OmegaConf.to_yaml({"model": model.config.resolved()})
        (partial / CONFIG).write_text(config, encoding="utf-8")
        if how == "pickle":
            (partial / WEIGHTS).write_bytes(pickle.dumps(Exploit(trap)))
        else:
            torch.save({"embedding.weight": Exploit(trap)}, partial / WEIGHTS)

    folder = tmp_path / "step_00000001"
    write_checkpoint(folder, fill)
    verify(folder)  # its manifest is in order: only the reader can refuse it
    with pytest.raises(ConfigError, match=f"checkpoint=.*cannot read {WEIGHTS}"):
        load_model(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Exploit(trap)))  # the trap is a real one
    assert trap.exists()


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path: Path) -> None:
    save_weights(small_model("MA", seed=1), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["layers.0.mixer.A_log"]
    tensors["layers.9.mixer.A_log"] = torch.ones(3)
    tensors["norm_f.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / WEIGHTS)
    model = small_model("MA", seed=2)
    before = model.fingerprint()
    with pytest.raises(ConfigError) as caught:
        load_weights(model, tmp_path, "checkpoint")
    message = str(caught.value)
    assert "missing layers.0.mixer.A_log" in message
    assert "unexpected layers.9.mixer.A_log" in message
    assert "norm_f.weight is (31,), the model's (32,)" in message
    assert model.fingerprint() == before


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    save_weights(small_model("M"), tmp_path)
    with pytest.raises(ConfigError, match=r"; and \d+ more\.$") as caught:
        load_weights(small_model("MMMM"), tmp_path, "checkpoint")
    assert str(caught.value).count("missing") == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "cannot read config.yaml"),
        ("data: {}", "no 'model' section"),
        ("- a\n- b\n", "no 'model' section"),
        (None, "cannot read config.yaml"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=f"checkpoint=.*{message}"):
        read_config(tmp_path, "checkpoint")


def test_a_config_cannot_reach_outside_its_values(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("model: !!python/object/apply:os.mkdir ['made']\n")
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path, "checkpoint")
    assert not Path("made").exists()
