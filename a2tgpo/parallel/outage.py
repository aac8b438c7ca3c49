"""A rollout's wait for a service that does not answer, as those who watch the rollout see it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Outage:
    """Whether this rank waits for a service, since when and why; read from any thread, told from one.

    Args:
        limit_s: longest wait, seconds; then the run is to end.
        clock: seconds, never going back.
    """

    def __init__(self, *, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self.limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self.cause = ("", "")
        """The tool, and one line why; of the last wait."""
        self._past_s = 0.0

    def begin(self, name: str, cause: str) -> None:
        """The rank waits for what is behind the tool `name` from now on, unless it waits already; one line why."""
        if self._since is None:
            self._since, self.cause = self._clock(), (name, cause)

    def end(self) -> None:
        """The service answers, or nobody waits for it any more."""
        self._past_s, self._since = self._past_s + self.seconds, None

    @property
    def is_on(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """Of the present wait; 0.0 where there is none."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def total_s(self) -> float:
        """Of all waits of this rank, the present one included."""
        return self._past_s + self.seconds

    @property
    def verdict(self) -> str:
        """Why the run is to end, one line; empty: it is not, for this."""
        if not self.is_on or self.seconds < self.limit_s:
            return ""
        name, cause = self.cause
        if not self.limit_s:
            return f"the {name} tool is out of service (search.on_outage=stop): {cause}"
        return f"the {name} tool has been out of service for {self.seconds:.0f} s (search.outage_limit_s): {cause}"
