"""From the cells of a sweep to its table and its figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import report
from eval.published import published
from eval.result import Grid, TaskResult
from eval.sweep.cell import mean_accuracy
from eval.sweep.config import SweepConfig, SweepTask

CONFIG = "sweep.json"
"""What a sweep's cells have in common, in its folder."""


@dataclass
class Point:
    """The best learning rate of each seed, for one model, width and test."""

    dataset: str
    model: str
    width: int
    length: int
    items: int
    accuracies: list[float]
    """Of the best learning rate, one a seed."""
    learning_rates: list[float]
    """Those rates."""
    cells: int
    """Finished, over all rates and seeds."""

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return sum(self.accuracies) / len(self.accuracies)


def summarise(folder: Path, config: SweepConfig) -> list[Point]:
    """Write summary.json, summary.md and accuracy.png of the finished cells, and show the table.

    Args:
        folder: The sweep's.
        config: The sweep; models are listed in its order.

    Returns:
        The points; none, and nothing written, where no cell is finished.
    """
    cells = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((folder / "cells").glob("*.json"))
    ]
    points = best_points(cells, list(config.models))
    if not points:
        return []
    figures = published(config.task.value, config.preset)
    by_length = config.task is SweepTask.induction
    whole = TaskResult(None, [_grid(points, len(cells), items=not by_length)], published=figures)
    grids = [*whole.grids, *report.published_grid(whole)]
    report.write(
        {
            "sweep": json.loads((folder / CONFIG).read_text(encoding="utf-8")),
            "models": {cell["model"]: cell["model_config"] for cell in cells},
            "datasets": {cell["dataset"]: cell["data"] for cell in cells},
            "environments": _environments(cells),
            "points": [{**vars(point), "accuracy": point.accuracy} for point in points],
            "published": figures,
            "cells": [_row(cell) for cell in cells],
        },
        folder / "summary.json",
        rows="cells",
    )
    markdown = [
        line for grid in grids for line in (f"## {grid.title}", "", *report.markdown(grid), "")
    ]
    with report.whole(folder / "summary.md") as file:
        file.write_text("\n".join(markdown), encoding="utf-8")
    with report.whole(folder / "accuracy.png") as file:
        draw(points, file, by_length=by_length)
    report.show(grids)
    return points


def best_points(cells: Sequence[dict[str, Any]], models: Sequence[str]) -> list[Point]:
    """Take the best learning rate of every seed: of the highest mean over the tests.

    Args:
        cells: As kept in files.
        models: Their order; models that are not among them are left out.
    """
    # One cell for all tests, so that a line over lengths is one model's.
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for cell in cells:
        if cell["model"] not in models:
            continue
        asked = [test for test in cell["tests"] if test["accuracy"] is not None]
        for test in asked:
            key = _test_of(cell, test)
            counts[key] = counts.get(key, 0) + 1
        question = (cell["dataset"], cell["model"], cell["width"], cell["seed"])
        if asked and (question not in best or _rank(cell) > _rank(best[question])):
            best[question] = cell
    found: dict[tuple[Any, ...], dict[int, tuple[float, float]]] = {}
    for cell in best.values():
        for test in cell["tests"]:
            if test["accuracy"] is not None:
                of_seed = (test["accuracy"], cell["learning_rate"])
                found.setdefault(_test_of(cell, test), {})[cell["seed"]] = of_seed
    points = [
        Point(
            *key,
            accuracies=[of[seed][0] for seed in sorted(of)],
            learning_rates=[of[seed][1] for seed in sorted(of)],
            cells=counts[key],
        )
        for key, of in found.items()
    ]
    return sorted(
        points, key=lambda p: (p.dataset, p.length, p.items, models.index(p.model), p.width)
    )


def _test_of(cell: dict[str, Any], test: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a point of the figure stands for, seeds and rates apart."""
    return (cell["dataset"], cell["model"], cell["width"], test["length"], test["items"])


def _rank(cell: dict[str, Any]) -> tuple[float, float]:
    """Return by what the rates of a seed are compared."""
    return mean_accuracy([test["accuracy"] for test in cell["tests"]]), cell["learning_rate"]


def draw(points: Sequence[Point], path: Path, *, by_length: bool) -> None:
    """Draw accuracy against model width, a panel for each test; or against length, in one panel.

    Args:
        points: At least one.
        path: PNG file.
        by_length: Whether the test's length is the horizontal axis, as for induction heads.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def panel_of(point: Point) -> tuple[Any, ...]:
        return (point.dataset,) if by_length else (point.dataset, point.length, point.items)

    panels = list(dict.fromkeys(panel_of(point) for point in points))
    models = list(dict.fromkeys(point.model for point in points))
    widths = list(dict.fromkeys(point.width for point in points))
    figure = Figure(figsize=(2.6 + 3.3 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        mine = [point for point in points if panel_of(point) == panel]
        for number, model in enumerate(models):
            for style, width in zip("-:", widths, strict=False) if by_length else [("-", None)]:
                line = [p for p in mine if p.model == model and (width is None or p.width == width)]
                if not line:
                    continue
                xs = [p.length if by_length else p.width for p in line]
                label = model if len(widths) == 1 or not by_length else f"{model}, d {width}"
                axis.plot(
                    xs, [p.accuracy for p in line], style, marker="o", markersize=4,
                    color=f"C{number % 10}", label=label,
                )  # fmt: skip
                axis.fill_between(
                    xs, [min(p.accuracies) for p in line], [max(p.accuracies) for p in line],
                    color=f"C{number % 10}", alpha=0.15, linewidth=0,
                )  # fmt: skip
        title = panel[0] if by_length else f"length {panel[1]}, {panel[2]} items"
        axis.set(title=title, xlabel="length" if by_length else "model width")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({p.length if by_length else p.width for p in mine}))
        if not by_length:
            axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    # Beside the panels: lines may lie anywhere in them, and not every panel has every line.
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    axes[-1].legend(
        handles=list(lines.values()), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small"
    )
    figure.savefig(path, dpi=150, format="png")


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what a cell found, without what it shares with others."""
    shared = ("model_config", "data", "environment")
    return {key: value for key, value in cell.items() if key not in shared}


def _environments(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the different machines and versions of the cells, each with the first date."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells:
        environment = cell["environment"]
        key = tuple(value for name, value in environment.items() if name != "date")
        found[key] = min(found.get(key, environment), environment, key=lambda e: e["date"])
    return list(found.values())


def _grid(points: Sequence[Point], cells: int, *, items: bool) -> Grid:
    """Return the table, with or without the column of items (induction has none)."""
    rows = [
        [
            p.dataset, f"{p.length:,}", *([str(p.items)] if items else []), p.model, str(p.width),
            f"{p.accuracy:.4f}", " ".join(f"{a:.3f}" for a in p.accuracies),
            " ".join(f"{rate:.1e}" for rate in p.learning_rates), str(p.cells),
        ]
        for p in points
    ]  # fmt: skip
    columns = [
        "data", "length", *(["items"] if items else []), "model", "width", "accuracy", "by seed",
        "rates", "cells",
    ]  # fmt: skip
    return Grid(f"Best over learning rates ({cells} cells)", columns, rows, ["accuracy"])
