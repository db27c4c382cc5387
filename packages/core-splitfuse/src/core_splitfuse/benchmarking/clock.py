"""The clock of a measurement: it runs while somebody computes, and idle time is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds since the measurement began.

    On a CPU the time of a process is what it computed, whoever else keeps the machine busy. What
    nobody waits for takes no time: :meth:`skip_to` moves the clock on to the next arrival.

    Args:
        seconds: what it runs by: processor time of the process that serves; wall time where a GPU
            computes; the time of a simulation.

    Example:
        >>> clock = Clock(lambda: 5.0)
        >>> clock.skip_to(2.5)
        >>> clock.now()
        2.5
    """

    def __init__(self, seconds: Callable[[], float] = time.process_time) -> None:
        self._seconds = seconds
        self._began = seconds()
        self._skipped = 0.0

    def now(self) -> float:
        """Seconds of work, and of idle time that was skipped."""
        return self._seconds() - self._began + self._skipped

    def skip_to(self, second: float) -> None:
        """Wait for a moment without waiting; one that has passed changes nothing."""
        self._skipped += max(0.0, second - self.now())
