"""A rollout's wait for an unavailable service, visible to the code that watches the rollout."""

from __future__ import annotations

import time
from collections.abc import Callable


class Outage:
    """Whether, since when and why this rank waits for a service; one thread writes, any thread reads.

    Args:
        limit_s: longest wait, seconds; then the run must end.
        clock: monotonic, seconds.
    """

    def __init__(self, *, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self.limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self.cause = ("", "")
        """Tool and one-line reason of the last wait."""
        self._past_s = 0.0

    def begin(self, name: str, cause: str) -> None:
        """Start a wait for the service of tool `name`, unless the rank already waits; `cause` is one line."""
        if self._since is None:
            self._since, self.cause = self._clock(), (name, cause)

    def end(self) -> None:
        """End the wait: the service answers, or no call waits for it any more."""
        self._past_s, self._since = self._past_s + self.seconds, None

    @property
    def is_on(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """Length of the present wait; 0.0 without one."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def total_s(self) -> float:
        """Length of all waits of this rank, including the present one."""
        return self._past_s + self.seconds

    @property
    def verdict(self) -> str:
        """Why this outage must end the run, one line; empty if it need not."""
        if not self.is_on or self.seconds < self.limit_s:
            return ""
        name, cause = self.cause
        if not self.limit_s:
            return f"the {name} tool is out of service (tools.on_outage=stop): {cause}"
        return f"the {name} tool has been out of service for {self.seconds:.0f} s (tools.outage_limit_s): {cause}"
