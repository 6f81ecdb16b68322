"""How often the screen is painted: often, but never for more than a small share of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST, LONGEST = 0.05, 0.5
IDLE = 0.25
SHARE = 0.03
"""Of one core: what painting may take while tokens come."""
FIGURES_BUSY, FIGURES_IDLE = 0.2, 1.0


class Pace:
    """Gives the time until the next tick. ``cost`` is the processor time of the calling thread so far."""

    def __init__(
        self, cost: Callable[[], float] = time.thread_time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cost = cost
        self._clock = clock
        self._spent_before = cost()
        self._smooth = 0.0
        self._figures_at = 0.0
        self.interval = SHORTEST

    def next(self, busy: bool) -> float:
        """Seconds until the next tick: so many that what one takes (painting included) keeps to :data:`SHARE`."""
        spent = self._cost()
        self._smooth = 0.7 * self._smooth + 0.3 * (spent - self._spent_before)
        self._spent_before = spent
        self.interval = min(LONGEST, max(SHORTEST, self._smooth / SHARE)) if busy else IDLE
        return self.interval

    def figures_due(self, busy: bool) -> bool:
        """Whether the figures are to be painted at this tick: about five times a second, once while nothing runs."""
        now = self._clock()
        wait = max(FIGURES_BUSY, 2 * self.interval) if busy else FIGURES_IDLE
        if now - self._figures_at < wait - SHORTEST / 2:
            return False
        self._figures_at = now
        return True
