"""Who trains which cell, where several processes share a sweep's folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO


class Claim:
    """A cell that this process trains and no other, until it is released or the process ends.

    It is a lock on a file beside the cell's. The system drops it with the process, so a cell whose
    process died is free again, whatever file it left.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        """Hold a lock that ``take`` took."""
        self._path, self._file = path, file

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """Claim a cell.

        Args:
            path: The lock's file.

        Returns:
            The claim, or None while another process has it.
        """
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that was released, and so removed, in between protects nothing.
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return cls(path, file)
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        return None

    def release(self) -> None:
        """Let others have the cell."""
        self._path.unlink(missing_ok=True)
        self._file.close()
