"""Every layout gives the loss, gradients, norm, parameters and logits of one process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.exactness import CASES
from tests.distributed.launch import run_by_torchrun, run_on
from tests.distributed.mixers import divides
from tests.layers.cases import all_cases

Results = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def results_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Results]:
    """Return what runs all cases of so many processes in one launch, once."""
    slow = ["--slow"] if request.config.getoption("--slow") else []

    @functools.cache
    def run(processes: int) -> Results:
        file: Path = tmp_path_factory.mktemp("exactness") / "results.json"
        run_on(processes, "-m", "tests.distributed.exactness", str(file), *slow)
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize("name", all_cases())
def test_every_mixer_on_two_processes_is_itself(
    results_of: Callable[[int], Results], name: str
) -> None:
    if not divides(all_cases()[name].build(), 2):
        pytest.skip("it has no plan, or an odd number of heads")
    results = results_of(2)[f"mixer {name}"]
    assert set(results) == {"output", "input gradient", "gradients", "steps"}
    for what, difference in results.items():
        assert difference <= 1e-9, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in CASES.items()
    ],
)
def test_layout_is_exact(results_of: Callable[[int], Results], name: str) -> None:
    results = results_of(CASES[name].processes)[name]
    assert set(results) == {"loss", "norm", "gradients", "parameters", "generation"}
    for what, difference in results.items():
        assert difference <= 1e-9, f"{what} differs by {difference:.1e}"


def test_weights_are_gathered_once_a_step_if_asked(results_of: Callable[[int], Results]) -> None:
    # Four blocks, embedding and norm; two micro-batches, each with a forward and a backward pass.
    found = results_of(2)["gathers"]
    assert found == {"fsdp2": 2 * (2 * 4 + 1), "fsdp2 gathered once": 4 + 1}


def test_the_fused_node_on_two_processes_is_the_mixer(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    slow = ["--slow"] if request.config.getoption("--slow") else []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton learns that it interprets when it is imported.
    run_by_torchrun(2, "-m", "tests.distributed.fused", str(tmp_path / "results.json"), *slow)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == (5 if slow else 3)
    for case, errors in results.items():
        assert {"y", "dx", "in_proj.weight", "A_log", "norm.weight"} <= set(errors)
        for what, error in errors.items():
            assert error < 3e-5, f"{case}: {what} differs by {error:.1e}"
