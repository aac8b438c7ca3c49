"""Stop sending requests to a server that does not answer, to spare it and the rollouts that would wait for it."""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Opens after `break_after` failures in a row, then allows one try every `break_s` until one succeeds.

    Safe to use from many threads.

    Args:
        break_after: failures in a row that open the breaker.
        break_s: seconds until one caller may try.
        clock: returns monotonic seconds.
    """

    def __init__(self, *, break_after: int, break_s: float, clock: Callable[[], float] = time.monotonic):
        self._break_after = break_after
        self._break_s = break_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try = 0.0

    def allows(self) -> bool:
        """Return whether a request may be sent now; the caller then reports its outcome."""
        with self._lock:
            if self._failures < self._break_after:
                return True
            now = self._clock()
            if now < self._next_try:
                return False
            self._next_try = now + self._break_s  # of all waiting callers, only this one tries
            return True

    def succeeded(self) -> None:
        """Report an answered request, which closes the breaker."""
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        """Report a request without an answer."""
        with self._lock:
            self._failures += 1
            if self._failures == self._break_after:
                self._next_try = self._clock() + self._break_s
