"""A run's folder: what is in it, and what may be written to it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mamba2lm.models import ModelConfig
from mamba2lm.models.checkpoint import (
    CONFIG,
    TOKENIZER,
    checkpoints_of,
    newest_valid,
    read_config,
    resolve,
)
from mamba2lm.models.lora import LoRAConfig
from mamba2lm.schema import ConfigError, from_mapping

log = logging.getLogger(__name__)

LOCK = "lock"
"""File in a run folder that the process writing to it holds."""

# What a run cannot change and still be the same run.
_SAME = (
    *("model", "lora", "data.sources", "data.sequence_length", "data.tokenizer"),
    "optimizer.kind",
)


@dataclass
class RunFolder:
    """Paths of a run, and the checkpoint it starts from."""

    path: Path
    resume_from: Path | None = None

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Text written by the model as it learned."""
        return self.path / "samples.txt"

    @property
    def plot(self) -> Path:
        """Training and held-out loss."""
        return self.path / "loss.png"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.path / TOKENIZER

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, as long as this process lives.

        Raises:
            ConfigError: Another process writes to it.
        """
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    "run_dir",
                    str(self.path),
                    f"{holder} is training in it; wait for its end or choose another folder.",
                ) from error
            except OSError as error:
                log.warning("%s cannot be locked against other runs (%s)", self.path, error)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                (self.path / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.path.rmdir()  # nothing came of it

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / CONFIG).write_text(OmegaConf.to_yaml(config), encoding="utf-8")


def open_run(run_dir: str, resume: str) -> RunFolder:
    """Decide where a run starts, without writing anything.

    Args:
        run_dir: The run's folder, existing or not.
        resume: "auto" continues a run found in ``run_dir``; "never" refuses one; anything else is
            a run folder or checkpoint to start from.

    Raises:
        ConfigError: ``run_dir`` holds what may not be overwritten, or ``resume`` names nothing.
    """
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError("run_dir", run_dir, "is a file; give a folder.")
    if path.is_dir() and {p.name for p in path.iterdir()} - {LOCK} and not _has_run_config(path):
        raise ConfigError(
            "run_dir", run_dir, "is a folder with other things in it; choose another."
        )
    holds_run = bool(checkpoints_of(path)) or (path / "metrics.jsonl").exists()
    if resume == "never":
        if holds_run:
            raise ConfigError(
                "run_dir", run_dir, "holds a run; choose another folder, or resume=auto to go on."
            )
        return RunFolder(path)
    if resume != "auto":
        checkpoint = resolve(resume, "resume")
        if holds_run and path.resolve() not in checkpoint.resolve().parents:
            raise ConfigError(
                "run_dir", run_dir, f"holds another run than resume={resume}; choose another."
            )
        newest = newest_valid(path) if holds_run else None
        if newest is not None and newest.resolve() != checkpoint.resolve():
            raise ConfigError(
                "run_dir", run_dir, f"holds later steps than resume={resume}; choose another."
            )
        return RunFolder(path, checkpoint)
    if not holds_run:
        return RunFolder(path)
    checkpoint = newest_valid(path)
    if checkpoint is None and checkpoints_of(path):
        raise ConfigError("run_dir", run_dir, "every checkpoint in it is damaged; choose another.")
    if checkpoint is None:
        log.warning(
            "%s holds a run that stopped before its first checkpoint: starting it over", path
        )
    return RunFolder(path, checkpoint)


def check_same_run(run: RunFolder, config: dict[str, Any]) -> None:
    """Refuse to continue a run with a model, tokenizer or data that are not its own.

    Args:
        run: With ``resume_from`` set.
        config: The resolved configuration of now.

    Raises:
        ConfigError: Naming the first key that differs, with both values.
    """
    assert run.resume_from is not None
    before = OmegaConf.create(_with_defaults(read_config(run.resume_from, "resume")))
    now = OmegaConf.create(_with_defaults(config))
    own = run.path.resolve() in run.resume_from.resolve().parents
    for key in _SAME if own else ("model", "lora"):
        for full, old, new in _differences(
            OmegaConf.select(before, key), OmegaConf.select(now, key), key
        ):
            raise ConfigError(
                full,
                new,
                f"the run in {run.resume_from} has {old!r}; give that, or another run_dir.",
            )


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Give settings that there were not when a run began the values that they have now."""
    return {
        **config,
        "model": from_mapping(ModelConfig, config["model"], "model").resolved(),
        "lora": asdict(from_mapping(LoRAConfig, config.get("lora"), "lora")),
    }


def copy_tokenizer(run: RunFolder, folder: Path) -> None:
    """Copy the run's tokenizer into a checkpoint folder, if it has one."""
    if run.tokenizer.is_dir():
        shutil.copytree(run.tokenizer, folder / TOKENIZER)


def _has_run_config(path: Path) -> bool:
    """Return whether a folder's ``config.yaml`` is one that a run wrote."""
    try:
        return "training" in read_config(path, "run_dir")
    except ConfigError:
        return False


def _differences(old: Any, new: Any, key: str) -> list[tuple[str, Any, Any]]:
    """List (key, old, new) of every leaf that differs."""
    if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
        names = dict.fromkeys([*old, *new])
        return [
            difference
            for name in names
            for difference in _differences(old.get(name), new.get(name), f"{key}.{name}")
        ]
    return [] if old == new else [(key, old, new)]
