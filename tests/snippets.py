"""Run the Python snippets of a Markdown document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_snippets(path: Path) -> int:
    """Execute every ```python block of a document in order, in one namespace.

    Args:
        path: The Markdown file. Tracebacks show its own line numbers.

    Returns:
        The number of blocks that ran.

    Raises:
        Exception: Whatever a snippet raises, a failed assertion above all.
    """
    text = path.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__snippets__"}
    count = 0
    for match in FENCE.finditer(text):
        lines_before = text.count("\n", 0, match.start(1))
        code = compile("\n" * lines_before + match[1], str(path), "exec")
        exec(code, namespace)
        count += 1
    return count
