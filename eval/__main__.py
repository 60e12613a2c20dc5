"""``python -m eval checkpoint=RUN 'tasks=[perplexity,recall]'``: tables, JSON, a report."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from eval import report
from eval.config import EvalConfig
from eval.result import TaskResult
from eval.tasks import run_task
from mamba2lm.cli import script
from mamba2lm.inference import find_model, load_run
from mamba2lm.schema import ConfigError

log = logging.getLogger("eval")


@script("eval", EvalConfig)
def main(config: EvalConfig) -> None:
    """Load each checkpoint, run the tasks, show and keep the results."""
    config.validate()
    output = None if config.output is None else Path(config.output)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError("output", config.output, "give a file name in a folder that exists.")
    paths = config.checkpoints or [str(config.checkpoint)]
    # Found before anything is evaluated: a wrong path costs no time.
    key = "checkpoints" if config.checkpoints else "checkpoint"
    folders = [find_model(path, key) for path in paths]
    report_folder = config.report or ("eval-report" if config.checkpoints else None)
    if report_folder is not None and Path(report_folder).is_file():
        raise ConfigError("report", report_folder, "is a file; give a folder.")

    documents: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str, TaskResult]] = {}
    for name, folder in zip(report.run_names(folders), folders, strict=True):
        documents[name], results[name] = evaluate(config, folder, key, output)
    if report_folder is not None and os.environ.get("RANK", "0") == "0":
        report.write_report(Path(report_folder), documents, results)
        log.info("report in %s", report_folder)


def evaluate(
    config: EvalConfig, folder: Path, key: str, output: Path | None
) -> tuple[dict[str, Any], dict[str, TaskResult]]:
    """Evaluate one checkpoint, show its tables and keep its JSON file."""
    run = load_run(folder, key=key, device=config.device, dtype=config.dtype)
    results: dict[str, TaskResult] = {}
    seconds: dict[str, float] = {}
    for task in dict.fromkeys(config.tasks):
        log.info("evaluating %s of %s", task, run.folder)
        began = time.perf_counter()
        results[task] = run_task(task, config, run)
        seconds[task] = time.perf_counter() - began
    document = report.document(config, run, results, seconds)
    path = output or report.default_output(run.folder)
    if run.is_main:
        report.write(document, path)
    for result in results.values():
        report.show([*result.grids, *report.published_grid(result)])
    log.info("kept in %s", path)
    return document, results


if __name__ == "__main__":
    main()
