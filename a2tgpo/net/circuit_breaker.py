"""Stop sending requests to a server that does not answer, so that rollouts do not wait for it."""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Refuses requests after `break_after` failures in a row, except for one try every `break_s` seconds. After a
    success, it allows all requests. The class is thread-safe.
    """

    def __init__(self, *, break_after: int, break_s: float, clock: Callable[[], float] = time.monotonic):
        self._break_after = break_after
        self._break_s = break_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try = 0.0

    def allows(self) -> bool:
        """Return whether a request may be sent now. A caller that sends the request must then call `succeeded` or
        `failed`.
        """
        with self._lock:
            if self._failures < self._break_after:
                return True
            now = self._clock()
            if now < self._next_try:
                return False
            self._next_try = now + self._break_s  # until then, no other caller may try
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures == self._break_after:
                self._next_try = self._clock() + self._break_s
