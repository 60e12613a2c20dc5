"""``python -m eval.sweep sweep=recall_fast``: train the cells that are missing, then summarise."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from eval import report
from eval.sweep.cell import Cell, Spec
from eval.sweep.claim import Claim
from eval.sweep.config import SweepConfig
from eval.sweep.data import SweepData
from eval.sweep.summary import CONFIG, summarise
from mamba2lm.cli import script
from mamba2lm.inference.loading import choose_device
from mamba2lm.schema import ConfigError
from mamba2lm.training.precision import matmul_dtype

log = logging.getLogger("eval.sweep")

# Steps of one cell before the next one's turn: Python stays ahead of the GPU.
_TURN = 16


@script("sweep", SweepConfig)
def main(config: SweepConfig) -> None:
    """Train what is missing, within the budget, and summarise what there is."""
    config.validate()
    # Streams beyond the queues of the hardware would wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    folder = Path(config.output)
    device = choose_device(config.device)
    open_folder(folder, config)
    run_cells(config, folder, device)
    summarise(folder, config)


def open_folder(folder: Path, config: SweepConfig) -> None:
    """Make the sweep's folder, or check that it belongs to the same sweep.

    Raises:
        ConfigError: The folder holds cells of another configuration, or is a file.
    """
    if folder.is_file():
        raise ConfigError("output", config.output, "is a file; give a folder.")
    same = identity(config)
    file = folder / CONFIG
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        different = [key for key in same if kept.get(key) != same[key]]
        if different:
            raise ConfigError(
                "output",
                config.output,
                f"holds a sweep with another {different[0]}; use another folder.",
            )
        return
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    report.write(same, file)


def identity(config: SweepConfig) -> dict[str, Any]:
    """Return what decides a cell's result: the grid's extent, speed and place do not."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    # Data sets and models are compared cell by cell.
    free = {"output", "datasets", "models", "widths", "learning_rates", "seeds", "concurrent",
            "graphs", "budget_s", "device", "skip_solved", "chunk"}  # fmt: skip
    kept = {str(key): value for key, value in plain.items() if key not in free}
    # Through JSON, as it will be read back.
    return json.loads(json.dumps(kept))


def specs(config: SweepConfig) -> list[Spec]:
    """Return all cells in the order they are trained in: rate by rate as given, every seed."""
    return [
        Spec(dataset, model, width, rate, seed)
        for rate, seed, dataset, width, model in itertools.product(
            config.learning_rates, config.seeds, config.datasets, config.widths, config.models
        )
    ]


def run_cells(config: SweepConfig, folder: Path, device: torch.device) -> None:
    """Train the cells that have no file yet and that no other process trains, several at a time.

    Args:
        config: The sweep; must be valid.
        folder: Opened by ``open_folder``.
        device: Where to train.
    """
    began = time.perf_counter()
    cells = folder / "cells"
    results = Results(config, cells)
    data: dict[str, SweepData] = {}
    live: list[tuple[Cell, Claim]] = []

    def next_cell() -> tuple[Cell, Claim] | None:
        # Looked for when there is room: what ended meanwhile, here or in another process that
        # shares the folder, may leave cells out.
        for spec in queue:
            results.read(spec)
            if results.has(spec) or (config.skip_solved and results.solved(spec)):
                continue
            claim = Claim.take(cells / f"{spec.name}.lock")
            if claim is None:
                continue
            if results.has(spec):  # finished by another process since
                claim.release()
                continue
            if spec.dataset not in data:
                data[spec.dataset] = SweepData(config, config.datasets[spec.dataset], device)
            return Cell(spec, config, data[spec.dataset], device), claim
        return None

    def over() -> bool:
        return config.budget_s is not None and time.perf_counter() - began >= config.budget_s

    for spec in specs(config):
        results.read(spec)
    queue = iter([spec for spec in specs(config) if not results.has(spec)])
    concurrent = config.concurrent if device.type == "cuda" else 1
    while not over():
        while len(live) < concurrent and (begun := next_cell()) is not None:
            live.append(begun)
        if not live:
            break
        for cell, claim in list(live):
            cell.advance(_TURN)
            if cell.done:
                live.remove((cell, claim))
                keep(cell, results.file(cell.spec), device)
                (cells / f"{cell.spec.name}.unfinished").unlink(missing_ok=True)
                claim.release()
                cell.close()
    for cell, claim in live:
        # What a cell had reached when time was up; it will start again.
        keep(cell, cells / f"{cell.spec.name}.unfinished", device)
        claim.release()


class Results:
    """The cells of a folder that are finished, by this process or by others."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        """Know none yet.

        Args:
            config: The sweep.
            folder: Of the cells' files.
        """
        self.config, self.folder = config, folder
        self._found: set[Spec] = set()
        self._solved: set[tuple[Any, ...]] = set()

    def file(self, spec: Spec) -> Path:
        """Return where a cell's result is, or will be."""
        return self.folder / f"{spec.name}.json"

    def has(self, spec: Spec) -> bool:
        """Return whether a cell is finished."""
        return spec in self._found or self.file(spec).is_file()

    def solved(self, spec: Spec) -> bool:
        """Return whether a rate of the cell's model, width and seed has reached ``stop_at``."""
        return _question(spec) in self._solved

    def read(self, spec: Spec) -> None:
        """Learn what is finished of the rates of a cell's question.

        Raises:
            ConfigError: A file was made of something else under the same name.
        """
        for rate in self.config.learning_rates:
            sibling = dataclasses.replace(spec, learning_rate=rate)
            if sibling in self._found or not self.file(sibling).is_file():
                continue
            kept = json.loads(self.file(sibling).read_text(encoding="utf-8"))
            for name, now in makings(self.config, sibling).items():
                if kept[name] != now:
                    raise ConfigError(
                        "output", self.config.output,
                        f"{self.file(sibling).name} was made with another {name}; use another "
                        "folder or names.",
                    )  # fmt: skip
            self._found.add(sibling)
            reached = [test["accuracy"] for test in kept["tests"] if test["accuracy"] is not None]
            stop_at = self.config.stop_at
            if stop_at is not None and reached and min(reached) >= stop_at:
                self._solved.add(_question(sibling))


def _question(spec: Spec) -> tuple[Any, ...]:
    """Return what the learning rates of a sweep are tried for."""
    return (spec.dataset, spec.model, spec.width, spec.seed)


def makings(config: SweepConfig, spec: Spec) -> dict[str, Any]:
    """Return what a cell is made of besides its place in the grid, as plain values."""
    return {
        "model_config": dataclasses.asdict(config.models[spec.model]),
        "data": dataclasses.asdict(config.datasets[spec.dataset]),
    }


def keep(cell: Cell, path: Path, device: torch.device) -> None:
    """Write a cell's result, with all it takes to repeat it."""
    result = cell.result()
    environment = report.environment(device, matmul_dtype(cell.config.precision, device))
    report.write({**result, **makings(cell.config, cell.spec), "environment": environment}, path)
    reached = ", ".join(
        "–" if test["accuracy"] is None else f"{test['accuracy']:.3f}" for test in result["tests"]
    )
    log.info(
        "%s: %s after %d of %d steps, %.0f s",
        cell.spec.name, reached, result["steps"], result["of_steps"], result["seconds"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
