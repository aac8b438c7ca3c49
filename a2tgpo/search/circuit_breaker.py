"""Spares a server that does not answer, and the rollouts that would wait for it."""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Refuses after so many failures in a row, then lets one try through every so often until one succeeds.

    Safe to use from many threads.

    Args:
        break_after: failures in a row that open it.
        break_s: how long it stays open before one caller may try, seconds.
        clock: seconds, never going back.
    """

    def __init__(self, *, break_after: int, break_s: float, clock: Callable[[], float] = time.monotonic):
        self._break_after = break_after
        self._break_s = break_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try = 0.0

    def allows(self) -> bool:
        """Whether a request may be sent now; the caller then reports how it went."""
        with self._lock:
            if self._failures < self._break_after:
                return True
            now = self._clock()
            if now < self._next_try:
                return False
            self._next_try = now + self._break_s  # of the callers that wait, this one tries
            return True

    def succeeded(self) -> None:
        """A request was answered: closed again."""
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        """A request got no answer."""
        with self._lock:
            self._failures += 1
            if self._failures == self._break_after:
                self._next_try = self._clock() + self._break_s
