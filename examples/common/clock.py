"""How long training takes."""

import statistics
import time
from collections import deque


class Clock:
    """Counts the time spent in training steps, without evaluations and checkpoints."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._laps: deque[float] = deque(maxlen=20)

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Ends a step; returns the median of the last ones, which no compilation distorts."""
        now = time.perf_counter()
        self._laps.append(now - self._last)
        self.seconds += now - self._last
        self._last = now
        return statistics.median(self._laps)
