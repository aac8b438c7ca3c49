"""Hold tool calls whose service is unavailable, and retry these calls until the service answers."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from a2tgpo.environment.tool import ToolUnavailableError
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.workers import Call

RETRY_S = 1.0
"""Seconds between two tries of a held call."""
WARN_EVERY_S = 60.0
"""Shortest time between two warnings about an unavailable service, in seconds."""

logger = logging.getLogger(__name__)


class HeldCalls:
    """Tool calls of one rank that are held because a service is unavailable.

    Args:
        outage: the record of outages. An outage begins when a service stops answering, and ends when all services
            answer.
    """

    def __init__(self, outage: Outage, *, clock: Callable[[], float] = time.monotonic):
        self._outage = outage
        self._clock = clock
        self._held: list[tuple[float, Call]] = []
        """Pairs (time of the next try, call), in ascending order of time."""
        self._out_of_service: set[str] = set()

        self._warned_at = -WARN_EVERY_S
        self._has_warned = False
        """Whether a warning about the current outage was logged."""

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, ended: Sequence[Call]) -> list[Call]:
        """Hold the calls among `ended` whose service was unavailable, and return the other calls."""
        served = []
        for call in ended:
            if isinstance(call.error, ToolUnavailableError):
                self._held.append((self._clock() + RETRY_S, call))
                self._miss(call)
            else:
                served.append(call)
                self._hear(call.name)
        return served

    def take_due(self) -> list[Call]:
        """Remove and return the held calls that are due for a retry."""
        now = self._clock()
        due = [call for at, call in self._held if at <= now]
        self._held = [(at, call) for at, call in self._held if at > now]
        return [dataclasses.replace(call, error=None) for call in due]

    def drop_all(self) -> None:
        """Discard all held calls and end the outage."""
        self._held.clear()
        self._out_of_service.clear()
        self._outage.end()

    def _miss(self, call: Call) -> None:
        self._out_of_service.add(call.name)
        if self._outage.is_on:
            return
        self._outage.begin(call.name, str(call.error))
        self._has_warned = self._outage.limit_s > 0 and self._clock() >= self._warned_at + WARN_EVERY_S
        if self._has_warned:
            self._warned_at = self._clock()
            logger.warning(
                "warning: the %s tool is out of service (%s); the rollout waits for it, for at most %g s "
                "(tools.outage_limit_s)",
                call.name,
                call.error,
                self._outage.limit_s,
            )

    def _hear(self, name: str) -> None:
        self._out_of_service.discard(name)
        if self._out_of_service or not self._outage.is_on:
            return
        if self._has_warned:
            logger.warning("the %s tool answers again after %.0f s", name, self._outage.seconds)
        self._outage.end()
