"""What every test shares: options, skips, threads, and a cache of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    # Tensors are small here: a second thread waits more than it works, and very long where the
    # cores are busy. `make test` uses them by running two test processes.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    reasons = {
        "slow": None if config.getoption("--slow") else "slow; run with --slow",
        "gpu": None if gpus >= 1 else "needs a CUDA GPU",
        "multigpu": None if gpus >= 2 else f"needs two CUDA GPUs, there are {gpus}",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tokens and tokenizers of the tests together, and out of the user's cache.

    The folder is the same for every pytest-xdist worker and for the commands the tests start.
    """
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mamba2lm-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBA2LM_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of larger corpora and tokenizers that MAMBA2LM_SHARED_DATA names."""
    folder = os.environ.get("MAMBA2LM_SHARED_DATA")
    if not folder:
        pytest.skip("MAMBA2LM_SHARED_DATA names no folder of shared corpora")
    return Path(folder)


@pytest.fixture(autouse=True)
def same_process_state() -> Iterator[None]:
    """Undo what a command run inside the test process sets for the whole process."""
    threads = torch.get_num_threads()
    level = logging.root.level
    yield
    torch.set_num_threads(threads)
    logging.root.setLevel(level)
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # of a stream that ends with this test
            logging.root.removeHandler(handler)
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
