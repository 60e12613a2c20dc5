"""Results as tables for people, as JSON with all it takes to repeat them, and as a report."""

from __future__ import annotations

import base64
import contextlib
import datetime
import html
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from eval.config import EvalConfig
from eval.result import Curve, Grid, TaskResult, finite
from mamba2lm import __version__
from mamba2lm.inference import LoadedRun


def show(grids: Sequence[Grid]) -> None:
    """Write tables to standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width; do not fold figures
    for grid in grids:
        table = Table(title=grid.title)
        for column in grid.columns:
            style = "bold" if column in grid.bold else None
            table.add_column(column, justify="right", style=style)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def published_grid(result: TaskResult) -> list[Grid]:
    """Return the table of what papers report for the task's preset, if there is one."""
    if not result.published:
        return []
    rows = [
        [
            figure["model"],
            figure["setting"],
            f"{figure['metric']} {'' if figure['value'] is None else figure['value']}".strip(),
            figure["remark"],
            figure["source"],
        ]
        for figure in result.published
    ]
    return [Grid("Published", ["model", "setting", "figure", "remark", "source"], rows)]


def document(
    config: EvalConfig,
    run: LoadedRun,
    results: Mapping[str, TaskResult],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return everything needed to repeat an evaluation, with its results.

    Args:
        config: As it was run.
        run: What was evaluated.
        results: By task.
        seconds: Task → wall-clock time.
    """
    weight = run.model.embedding.weight
    return {
        "checkpoint": str(run.folder.resolve()),
        "step": step_of(run.folder),
        "model": {
            "pattern": run.model.config.letters,
            "parameters": run.model.parameter_count(),
            "fingerprint": run.fingerprint,
        },
        "results": {task: result.values for task, result in results.items()},
        "published": {task: r.published for task, r in results.items() if r.published},
        "seconds": {task: round(value, 3) for task, value in seconds.items()},
        "config": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        "environment": environment(weight.device, weight.dtype),
    }


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return date, versions, commit and machine."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mamba2lm": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def write(values: dict[str, Any], path: Path, *, rows: str | None = None) -> None:
    """Write a JSON file.

    Args:
        values: Numbers that are not finite are written as null.
        path: The file.
        rows: The key of a list whose items take a line each, as its last.
    """
    plain = _plain(values)
    items = [] if rows is None else plain.pop(rows)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    if rows is not None:
        lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in items]
        comma = "," if plain else ""
        text = f'{text[:-2]}{comma}\n  "{rows}": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}"
    with whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file's name once it is written, whoever else writes the same.

    Yields:
        What to write instead, in the same folder.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_report(
    folder: Path,
    documents: Mapping[str, dict[str, Any]],
    results: Mapping[str, Mapping[str, TaskResult]],
) -> None:
    """Write report.json, report.md, report.html and a PNG for every figure.

    Args:
        folder: Made if need be; its files of these names are replaced.
        documents: Run's name → what ``document`` returned.
        results: Run's name → task → result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write({"runs": dict(documents)}, folder / "report.json")
    figures = _draw(folder, results)
    parts: list[Grid] = [_overview(documents)]
    tasks = list(dict.fromkeys(task for found in results.values() for task in found))
    for task in tasks:
        first = next(found[task] for found in results.values() if task in found)
        parts.append(_comparison(task, results))
        for run, found in results.items():
            for grid in found[task].grids if task in found else []:
                parts.append(Grid(f"{grid.title} · {run}", grid.columns, grid.rows, grid.bold))
        parts += published_grid(first)
    one = next(iter(documents.values()))
    note = (
        f"Made {one['environment']['date']} with mamba2lm {one['environment']['mamba2lm']} "
        f"(commit {one['environment']['git_commit']}), torch {one['environment']['torch']}, "
        f"{one['environment']['device']}, {one['environment']['dtype']}. Configurations, seeds and "
        "fingerprints of weights and texts are in report.json."
    )
    text = ["# Evaluation", "", note, ""]
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Evaluation</title>"
        "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;"
        "padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}</style>",
        f"<h1>Evaluation</h1><p>{html.escape(note)}</p>",
    ]
    for grid in parts:
        text += [f"## {grid.title}", "", *markdown(grid), ""]
        page.append(f"<h2>{html.escape(grid.title)}</h2>{_html(grid)}")
    for title, path in figures:
        text += [f"![{title}]({path.name})", ""]
        data = base64.b64encode(path.read_bytes()).decode()
        page.append(f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>")
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    (folder / "report.html").write_text("\n".join(page) + "</html>\n", encoding="utf-8")


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each checkpoint, all different."""
    names = []
    for folder in folders:
        folder = folder.resolve()
        if (name := hub_name(folder)) is not None:
            names.append(name)
            continue
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        step = step_of(folder)
        names.append(run.name if step is None else f"{run.name} at {step}")
    return [
        name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def default_output(checkpoint: Path) -> Path:
    """Return a new file name in the run's folder, or beside a checkpoint that is in no run.

    The checkpoint's own folder is hashed and never written to. Of a model that came from the hub
    it is the current folder.
    """
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    step = step_of(checkpoint)
    stem = f"eval-{checkpoint.name if step is None else step}"
    if (name := hub_name(checkpoint)) is not None:
        folder, stem = Path.cwd(), f"eval-{name.replace('/', '--')}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}.{number}.json"
    return path


def hub_name(folder: Path) -> str | None:
    """Return the name on the hub of a folder in the hub's cache, None elsewhere."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None where there is none."""
    found = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def git_commit() -> str | None:
    """Return the commit of this program's folder, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    """Return a value with None for the numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return finite(value) if isinstance(value, float) else value


def _overview(documents: Mapping[str, dict[str, Any]]) -> Grid:
    rows = [
        [
            name,
            found["model"]["pattern"],
            f"{found['model']['parameters']:,}",
            "" if found["step"] is None else f"{found['step']:,}",
            found["model"]["fingerprint"][:8],
        ]
        for name, found in documents.items()
    ]
    return Grid("Runs", ["run", "pattern", "parameters", "step", "fingerprint"], rows)


def _comparison(task: str, results: Mapping[str, Mapping[str, TaskResult]]) -> Grid:
    """Return one row a figure and one column a run."""
    lines = dict.fromkeys(
        line for found in results.values() if task in found for line in found[task].headline
    )
    rows = []
    for line in lines:
        values = [
            found[task].headline.get(line) if task in found else None for found in results.values()
        ]
        rows.append([line, *("" if value is None else _short(value) for value in values)])
    return Grid(f"Compared: {task}", ["figure", *results], rows)


def _short(value: float) -> str:
    """Return a figure for a table: four places, none of large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4f}"


def _draw(folder: Path, results: Mapping[str, Mapping[str, TaskResult]]) -> list[tuple[str, Path]]:
    """Draw every figure with the curves of all runs; return titles and files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    together: dict[str, list[tuple[str, Curve]]] = {}
    for run, found in results.items():
        for result in found.values():
            for curve in result.curves:
                label = f"{run}, {curve.label}" if curve.label else run
                together.setdefault(curve.figure, []).append((label, curve))
    drawn = []
    for title, curves in together.items():
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for label, curve in curves:
            axes.plot(curve.xs, curve.ys, marker="o", markersize=3, label=label)
        first = curves[0][1]
        if first.log_x:
            axes.set_xscale("log", base=2)
        else:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10M tokens
        if first.y_label == "accuracy":
            axes.set_ylim(-0.03, 1.03)
        axes.set(title=title, xlabel=first.x_label, ylabel=first.y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        drawn.append((title, path))
    return drawn


def markdown(grid: Grid) -> list[str]:
    """Return a table's lines in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(grid.columns) - 1)
    return [line(grid.columns), rule, *(line(row) for row in grid.rows)]


def _html(grid: Grid) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    rows = "".join(line(row, "td") for row in grid.rows)
    return f"<table>{line(grid.columns, 'th')}{rows}</table>"
