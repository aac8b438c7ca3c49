"""Stop sending requests to a server that does not answer, so that rollouts do not wait for its answers."""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Refuses requests after `break_after` failures in a row.

    It then allows one try every `break_s` seconds. After a try succeeds, it allows all requests again. Many threads
    may use it at the same time.

    Args:
        break_after: number of failures in a row after which the breaker opens (refuses requests).
        break_s: seconds after which one caller may try again.
        clock: function that returns the time in seconds and never goes back.
    """

    def __init__(self, *, break_after: int, break_s: float, clock: Callable[[], float] = time.monotonic):
        self._break_after = break_after
        self._break_s = break_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try = 0.0

    def allows(self) -> bool:
        """Return whether a request may be sent now; if so, the caller must then call `succeeded` or `failed`."""
        with self._lock:
            if self._failures < self._break_after:
                return True
            now = self._clock()
            if now < self._next_try:
                return False
            self._next_try = now + self._break_s  # of all waiting callers, only this one tries
            return True

    def succeeded(self) -> None:
        """Report that a request was answered; the breaker then allows all requests."""
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        """Report that a request got no answer."""
        with self._lock:
            self._failures += 1
            if self._failures == self._break_after:
                self._next_try = self._clock() + self._break_s
