"""What may end a run before its last step: being told to stop, and steps that teach nothing."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import statistics
from collections.abc import Iterator
from types import FrameType

from mamba2lm.training.checkpoint import Progress
from mamba2lm.training.config import TrainingConfig

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit code after SIGTERM: saved, and ``resume=auto`` goes on from there (EX_TEMPFAIL)."""
EXIT_UNSAVED = 4
"""Exit code when the last checkpoint could not be written; those before it are untouched."""
EXIT_DIVERGED = 3
"""Exit code after too many steps in a row that were not finite."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks for a stop; the first wins where processes got different ones."""
SPIKE_WINDOW = 64
"""Steps whose losses say what a spike is."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class StopRequests:
    """Signals by which a process was asked to stop, and what all of them make of it."""

    def __init__(self) -> None:
        self._asked = 0
        self._arrivals = -1
        self._arrived = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Let SIGTERM and SIGUSR1 ask for a stop at the end of a step."""

        def request(signum: int, frame: FrameType | None) -> None:
            self._asked = signum

        # The handler runs in the main thread, once that is back from whatever it waits for. A
        # signal's number is written to this pipe at once.
        self._arrivals, writing = os.pipe()
        for end in (self._arrivals, writing):
            os.set_blocking(end, False)
        woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            for end in (self._arrivals, writing):
                os.close(end)
            self._arrivals = -1

    def arrived(self) -> bool:
        """Return whether this process was asked to stop; for a thread other than the main one.

        Where ``flags`` waits for the main thread to hear of it, this does not.
        """
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self._arrivals, 4096)
            self._arrived |= any(number in STOP_SIGNALS for number in numbers)
        return self._arrived

    def flags(self) -> list[float]:
        """Return this process's word, to be added over all processes."""
        return [float(self._asked == number) for number in STOP_SIGNALS]

    @staticmethod
    def decide(flags: list[float]) -> int:
        """Return the signal that the sums over all processes ask for; 0 for none."""
        return next((n for n, asked in zip(STOP_SIGNALS, flags, strict=True) if asked), 0)


class StepPolicy:
    """Which steps to learn from; of sums over all processes, so that all decide alike."""

    def __init__(self, config: TrainingConfig, progress: Progress, *, is_main: bool) -> None:
        """Begin without a bad step.

        Args:
            config: What is too much.
            progress: Of the run; it holds the losses that a spike is compared with.
            is_main: Whether this process speaks for all in the log.
        """
        self._config, self._progress, self._is_main = config, progress, is_main
        self._bad_in_a_row = 0

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Return whether to learn from a step; log one that is skipped.

        Raises:
            NonFiniteError: ``training.max_bad_steps`` in a row were not to be learned from.
        """
        if self._is_good(loss, grad_norm):
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        step, first = self._progress.step + 1, self._progress.samples
        if self._is_main:
            log.warning(
                "step %d skipped: loss %s, gradient norm %s, samples %d to %d",
                step, loss, grad_norm, first, first + self._config.batch_size - 1,
            )  # fmt: skip
        if self._bad_in_a_row >= self._config.max_bad_steps:
            raise NonFiniteError(
                f"{self._bad_in_a_row} steps in a row without a finite loss and gradient"
                + (" or with a loss spike" if self._config.spike_sigmas is not None else "")
                + f", the last at step {step}; the newest checkpoint is from before. Lower "
                "optimizer.learning_rate or training.max_grad_norm, or use training.precision=fp32."
            )
        return False

    def _is_good(self, loss: float, grad_norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        recent, sigmas = self._progress.recent_losses, self._config.spike_sigmas
        if sigmas is None:
            return True
        if len(recent) == SPIKE_WINDOW:
            mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
            if loss > mean + sigmas * deviation:
                return False
            del recent[0]
        recent.append(loss)
        return True
