"""How many steps go by before the host looks at what they drew."""

from __future__ import annotations

from mamba2lm.inference.batch import Flight

DELIVERY_SECONDS = 0.01
"""A streamed token waits at most about so long for others."""

# Steps between two looks of a host that is in time, which is one that waits so many seconds for the
# tokens; and the weight of the newest look in whether it is.
_STRIDE = 8
_IN_TIME = 2e-4
_NEWEST = 0.1


class Pace:
    """Chooses strides by how long the device takes a step, and whether the host keeps up."""

    def __init__(self, most: int, *, steady: bool = False) -> None:
        """Know nothing yet.

        Args:
            most: Steps, whatever else is so.
            steady: Go by no clock, as where several processes have to take the same steps.
        """
        self.most = most
        self._steady = steady
        self.step_seconds = 0.0
        """Of the device."""
        self.late = 0.0
        """Share of the looks, of late, that came when all had been drawn already."""

    def steps(self, left: int, *, streamed: bool) -> int:
        """Return how many steps to take.

        More for a host that comes when a GPU has nothing to do any more.

        Args:
            left: Tokens that any row may still draw.
            streamed: Whether somebody waits for them.
        """
        count = min(self.most, left)
        if self.late < 0.5:
            count = min(count, _STRIDE)
        if streamed:
            count = min(count, int(DELIVERY_SECONDS / max(self.step_seconds, 1e-6)))
        return max(count, 1)

    def heard(self, flight: Flight, waited: float) -> None:
        """Learn from steps that the host has waited for, so many seconds."""
        if self._steady:
            return
        self.step_seconds = flight.step_seconds() or self.step_seconds
        if flight.steps > 1:
            self.late += _NEWEST * ((waited < _IN_TIME) - self.late)
