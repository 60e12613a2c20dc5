"""docs/theory.md: its snippets run, and the functions and tests it names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .snippets import FENCE, run_snippets

ROOT = Path(__file__).resolve().parent.parent
THEORY = ROOT / "docs" / "theory.md"


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_snippets_run() -> None:
    assert run_snippets(THEORY) == len(FENCE.findall(THEORY.read_text(encoding="utf-8"))) >= 10


def test_a_wrong_snippet_fails_at_its_line(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("# Title\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_snippets(document)
    assert caught.traceback[-1].lineno == 7  # counted from 0


def test_named_functions_exist() -> None:
    names = set(re.findall(r"`(mamba2lm\.ops[\w.]*)`", THEORY.read_text(encoding="utf-8")))
    assert len(names) >= 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute)), name


def test_named_tests_exist() -> None:
    text = THEORY.read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text))
    assert len(named) >= 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), test
