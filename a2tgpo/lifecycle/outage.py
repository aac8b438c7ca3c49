"""A record of a rollout's waits for an unavailable service."""

from __future__ import annotations

import time
from collections.abc import Callable


class Outage:
    """Records whether this rank waits for a service, since when, and why. Only one thread may call `begin` and `end`.

    Args:
        limit_s: the number of seconds after which a wait must end the run.
        clock: function that returns seconds, which never decrease.
    """

    def __init__(self, *, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self.limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self.cause = ("", "")
        """Name of the tool for which this rank waited last, and the reason for this wait in one line."""
        self._past_s = 0.0

    def begin(self, name: str, cause: str) -> None:
        """Record that this rank begins to wait for tool `name`, unless it waits already. `cause` is one line."""
        if self._since is None:
            self._since, self.cause = self._clock(), (name, cause)

    def end(self) -> None:
        """Record that this rank's wait has ended."""
        self._past_s, self._since = self._past_s + self.seconds, None

    @property
    def is_on(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """Seconds since the current wait began. 0.0 if this rank is not waiting."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def total_s(self) -> float:
        """Seconds of all waits of this rank, including the present one."""
        return self._past_s + self.seconds

    @property
    def verdict(self) -> str:
        """Why the present wait must end the run, in one line. Empty if the run may continue."""
        if not self.is_on or self.seconds < self.limit_s:
            return ""
        name, cause = self.cause
        if not self.limit_s:
            return f"the {name} tool is out of service (tools.on_outage=stop): {cause}"
        return f"the {name} tool has been out of service for {self.seconds:.0f} s (tools.outage_limit_s): {cause}"
