"""A conversation at the terminal."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator

from mamba2lm.inference.config import GenerateConfig
from mamba2lm.inference.session import Session
from mamba2lm.schema import ConfigError

HELP = "Write the beginning of a text. /reset forgets it, /quit or Ctrl-D ends, Ctrl-C stops."


def converse(session: Session, config: GenerateConfig, first: str | None = None) -> None:
    """Take turns with the user until they end it.

    What the user writes and what the model replies make up one text: the first line begins it, a
    later one starts a new line of it. Turn i is drawn with seed + i.

    Args:
        session: Keeps the state between turns.
        config: ``max_new_tokens``, ``seed`` and ``sampling`` are read.
        first: A first turn, before the user is asked.
    """
    terminal = sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # line editing and history for input()
    if terminal:
        sys.stderr.write(f"{HELP}\n")
    turn, begun = 0, config.load_state is not None
    line = first
    while True:
        if line is None:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                break
            except KeyboardInterrupt:
                sys.stderr.write("\n/quit or Ctrl-D ends\n")
                continue
        command = line.strip()
        if command == "/quit":
            break
        if command == "/reset":
            session.reset()
            begun = False
        elif command.startswith("/"):
            sys.stderr.write(f"no command {command}; known: /reset, /quit\n")
        elif command or begun:
            text = f"\n{line}" if begun and line else line
            try:
                reply(session, text, config, seed=config.seed + turn)
                begun = True
            except ConfigError as error:
                sys.stderr.write(f"{error}\n")
            turn += 1
        line = None


def reply(session: Session, text: str, config: GenerateConfig, *, seed: int) -> None:
    """Write the model's reply to ``text`` piece by piece, then a line end and the speed."""
    with interruptible(session):
        for piece in session.stream(
            text, config.sampling, max_new_tokens=config.max_new_tokens, seed=seed
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextlib.contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Let Ctrl-C end the reply between two tokens, where the state is whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: session.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
