"""Launch configurations by class of shapes, read from an operator's ``tuned/*.json``.

One file per GPU generation, named by its compute capability, and ``default.json`` with safe choices
for all others. A file is a list of entries: ``when``, bounds on named numbers of a shape, and
``use``, the fields of the operator's configuration. The first entry whose bounds hold is taken.
Nothing is tuned while a program runs.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

Config = TypeVar("Config")


class Tuned(Generic[Config]):
    """The configurations of one operator, and one that may be put in place of them all."""

    def __init__(self, folder: Path, config: type[Config], blocks: type) -> None:
        """Say where the files are and what their entries become.

        Args:
            folder: Where the files are.
            config: Dataclass of all choices for one class of shapes.
            blocks: Dataclass of its fields that describe how one kernel is launched.
        """
        self.folder, self.config, self.blocks = folder, config, blocks
        self.override: Config | None = None
        self.entries = lru_cache(self._entries)
        self._parsed = lru_cache(self._parse_all)

    def _entries(self, major: int) -> list[dict[str, Any]]:
        path = self.folder / f"sm{major}0.json"
        return json.loads((path if path.exists() else self.folder / "default.json").read_text())

    def _parse_all(self, major: int) -> list[tuple[dict[str, list[int]], Config]]:
        return [(entry["when"], self.parse(entry["use"])) for entry in self.entries(major)]

    def parse(self, use: dict[str, Any]) -> Config:
        """Build a configuration from what one entry uses."""
        fields = {
            name: self.blocks(**value) if isinstance(value, dict) else value
            for name, value in use.items()
        }
        return self.config(**fields)

    def choose(self, major: int, **shape: int) -> Config:
        """Choose the configuration for a shape; the same object for the same entry.

        Args:
            major: Major compute capability of the GPU; 0 for none.
            shape: The numbers that entries put bounds on.
        """
        for bounds, config in self._parsed(major):
            if all(low <= shape[name] <= high for name, (low, high) in bounds.items()):
                return config
        raise AssertionError("the last entry of a tuned file must accept every shape")
