"""Rooms are entered from above only: the shape of the house, kept by parsing every import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mamba2lm"

# A room may import rooms of a lower floor, never one of its own floor or above.
FLOORS = {
    "schema": 0,
    "host": 0,
    "jobs": 1,
    "ops": 1,
    "distributed": 1,
    "cli": 2,
    "layers": 2,
    "models": 3,
    "data": 3,
    "hub": 4,
    "training": 5,
    "inference": 5,
    "config": 6,
}
SCRIPTS = [ROOT / "train.py", ROOT / "generate.py", *sorted((ROOT / "eval").rglob("*.py"))]
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """Return the room of a dotted module name, None for other packages and the bare package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mamba2lm" and len(parts) > 1 else None


def imports(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import of a file, in functions too, relative or not."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    text = path.read_text(encoding="utf-8") if source is None else source
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def trespasses(path: Path, source: str | None = None) -> list[str]:
    """List the imports of a file of the package that go sideways or up."""
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for line, name in imports(path, source):
        theirs = room_of(name)
        if mine == "__init__":
            allowed = theirs is None
        else:
            allowed = theirs in (None, mine) or FLOORS[theirs] < FLOORS[mine]
        if not allowed:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    assert trespasses(path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/ssd/op.py", "from mamba2lm.layers import Mixer"),
        ("data/loader.py", "from mamba2lm.models import LanguageModel"),
        ("models/config.py", "import mamba2lm.data.loader"),
        ("models/config.py", "def late():\n    from mamba2lm import data"),
        ("layers/mlp.py", "from ..models.config import ModelConfig"),
        ("training/trainer.py", "from mamba2lm.config import TrainConfig"),
        ("inference/engine.py", "from mamba2lm.training import trainer"),
        ("hub/export.py", "from mamba2lm.inference import load_run"),
        ("schema.py", "import mamba2lm.ops"),
    ],
)
def test_a_trespass_is_seen(file: str, source: str) -> None:
    assert len(trespasses(PACKAGE / file, source)) == 1


def test_data_and_models_do_not_know_each_other() -> None:
    for room, other in (("data", "models"), ("models", "data"), ("data", "layers")):
        for path in (PACKAGE / room).rglob("*.py"):
            assert all(room_of(name) != other for _, name in imports(path)), path


def test_only_scripts_evaluation_and_tests_read_the_root_schemas() -> None:
    readers = {
        path.relative_to(ROOT)
        for path in [*MODULES, *SCRIPTS]
        if any(room_of(name) == "config" for _, name in imports(path))
    }
    assert Path("train.py") in readers
    assert not [path for path in readers if path.parts[0] == "mamba2lm"]


def test_nothing_outside_tests_imports_tests() -> None:
    for path in [*MODULES, *SCRIPTS]:
        assert not [name for _, name in imports(path) if name.split(".")[0] == "tests"], path


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []
