"""Tool calls whose service is out of service: held, and made again until it answers."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from a2tgpo.environment.tool import ToolUnavailableError
from a2tgpo.parallel.outage import Outage
from a2tgpo.rollout.tool_workers import Call

RETRY_S = 1.0
"""Between two makings of a held call; a client that spares its server fails at once meanwhile."""
SAY_EVERY_S = 60.0
"""A service that comes and goes is spoken of so often at most."""

logger = logging.getLogger(__name__)


class HeldCalls:
    """The calls of one rank that wait for a service, and the outage that they make up.

    Args:
        outage: told when a service stops answering and when it answers again.
        clock: seconds, never going back.
    """

    def __init__(self, outage: Outage, *, clock: Callable[[], float] = time.monotonic):
        self._outage = outage
        self._clock = clock
        self._held: list[tuple[float, Call]] = []
        """When each call is due again, ascending."""
        self._out_of_service: set[str] = set()
        """Names of tools."""
        self._said_at = -SAY_EVERY_S
        self._has_said = False
        """Of the present outage."""

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, ended: Sequence[Call]) -> list[Call]:
        """Hold the calls among `ended` that nobody served; the others are returned, to be handed out."""
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
        """The held calls that are to be made again now."""
        now = self._clock()
        due = [call for at, call in self._held if at <= now]
        self._held = [(at, call) for at, call in self._held if at > now]
        return [dataclasses.replace(call, error=None) for call in due]

    def drop_all(self) -> None:
        """Hold nothing, and wait for nothing."""
        self._held.clear()
        self._out_of_service.clear()
        self._outage.end()

    def _miss(self, call: Call) -> None:
        self._out_of_service.add(call.name)
        if self._outage.is_on:
            return
        self._outage.begin(call.name, str(call.error))
        self._has_said = self._outage.limit_s > 0 and self._clock() >= self._said_at + SAY_EVERY_S
        if self._has_said:
            self._said_at = self._clock()
            logger.warning(
                "warning: the %s tool is out of service (%s); the rollout waits for it, for at most %g s "
                "(search.outage_limit_s)",
                call.name,
                call.error,
                self._outage.limit_s,
            )

    def _hear(self, name: str) -> None:
        self._out_of_service.discard(name)
        if self._out_of_service or not self._outage.is_on:
            return
        if self._has_said:
            logger.warning("the %s tool answers again after %.0f s", name, self._outage.seconds)
        self._outage.end()
