"""Run tool calls in the background. All ranks of an engine receive the answers in the same order."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.environment.tool import Tool, ToolError, Toolset
from a2tgpo.io.errors import first_line
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.workers import Call, CallsHangError, Workers
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.rollout.held_calls import HeldCalls

WAIT_S = 1.0
"""Seconds that one call of `ToolPool.results` waits at most."""
IDLE_S = 0.1
"""Seconds of one wait if every pending call is held, because no thread can return an answer then."""


class ToolFaultError(RuntimeError):
    """Raised on all ranks of an engine, with a one-line message, if a tool has a bug or hangs too often."""


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    key: int
    """The key that `ToolPool.submit` returned."""
    parts: tuple[str, ...] = ()
    error: str | None = None
    """One line that says why the call failed, or None if the call succeeded."""
    is_late: bool = False
    """Whether the call failed because it exceeded its deadline."""


class ToolPool:
    """Run tool calls in threads, and return their answers as they arrive.

    The ranks of an engine must make the same calls in the same order. Only the first rank calls tools and reads
    the clock. This rank broadcasts answers and faults, because the schedulers of all ranks must see the same requests
    in the same order.

    If the toolset has an outage limit, a call to an unavailable service is retried until the service answers.

    Args:
        engine_group: the ranks that share the engine.
    """

    def __init__(
        self,
        toolset: Toolset,
        *,
        engine_group: EngineGroup = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tools, self.take_counts = toolset.tools, toolset.take_counts
        self._workers = Workers(
            "tool", toolset.max_concurrent_calls, deadline_s=toolset.call_timeout_s, clock=clock
        )
        self._late = f"no answer within {toolset.call_timeout_s:g} s"
        self._clock = clock
        self.outage = Outage(limit_s=toolset.outage_limit_s or 0.0, clock=clock)
        """The wait for a service, equal on all ranks of the engine. The caller must enforce its limit."""
        self._held = None if toolset.outage_limit_s is None else HeldCalls(self.outage, clock=clock)
        self._group = engine_group.group
        self._leads = engine_group.is_leader
        self._pending: set[int] = set()
        self._num_submitted = 0
        self.waited_s = 0.0
        """Seconds spent in calls of `results` with `wait=True`."""

    def submit(self, name: str, text: str) -> int:
        """Queue a call of the tool `name` with `text`, and return a unique key for the answer."""
        key = self._num_submitted
        self._num_submitted += 1
        self._pending.add(key)
        if self._leads:
            self._workers.submit(
                Call(key=key, name=name, run=functools.partial(_answer, self._tools[name], text))
            )
        return key

    def results(self, *, wait: bool) -> list[ToolResult]:
        """Return the answers that have arrived since the last call.

        Args:
            wait: whether to wait up to `WAIT_S` for an answer if none has arrived.

        Raises:
            ToolFaultError: if a tool raised an exception other than `ToolError`, or if too many calls hang.
        """
        if not self._pending:
            return []
        arrived, fault = self._collect(wait) if self._leads else ([], None)
        if self._group is not None:
            cause = self.outage.cause if self.outage.is_on else None
            arrived, fault, cause = broadcast_object((arrived, fault, cause), self._group, source=0)
            if cause is None:
                self.outage.end()
            else:
                self.outage.begin(*cause)
        if fault is not None:
            raise ToolFaultError(fault)
        self._pending.difference_update(result.key for result in arrived)
        return arrived

    def drop_pending(self) -> None:
        self._pending.clear()
        self._workers.drop_all()
        if self._held is not None:
            self._held.drop_all()

    def close(self) -> None:
        """Discard the pending calls. A thread that hangs in a call ends when that call returns."""
        self._workers.close()

    def _collect(self, wait: bool) -> tuple[list[ToolResult], str | None]:
        """Return the answers that have arrived, and the fault that ends the run, if any."""
        start = self._clock()
        try:
            calls = self._take(wait)
            self.waited_s += self._clock() - start if wait else 0.0
            return [self._result(call) for call in calls], None
        except (CallsHangError, ToolFaultError) as error:
            return [], str(error)

    def _take(self, wait: bool) -> list[Call]:
        """Return the ended calls that are not held. If `wait`, wait up to `WAIT_S` for a first call to end."""
        if self._held is None:
            return self._workers.take(timeout_s=WAIT_S if wait else 0.0)
        for call in self._held.take_due():
            self._workers.submit(call)
        if wait and len(self._held) == len(self._pending):
            time.sleep(IDLE_S)
        return self._held.keep(self._workers.take(timeout_s=WAIT_S if wait else 0.0))

    def _result(self, call: Call) -> ToolResult:
        if call.is_late:
            return ToolResult(key=call.key, error=self._late, is_late=True)
        if isinstance(call.error, ToolError):
            return ToolResult(key=call.key, error=str(call.error))
        if call.error is not None:
            raise ToolFaultError(_fault(call.name, call.error))
        return ToolResult(key=call.key, parts=call.result)


def _answer(tool: Tool, text: str) -> tuple[str, ...]:
    """Return the parts of the tool's answer. Raise TypeError unless they are a non-empty list of texts."""
    parts = tool.call(text)
    if isinstance(parts, str) or not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"it returned {parts!r:.80}, not a list of at least one text")
    return tuple(parts)


def _fault(name: str, error: Exception) -> str:
    """Describe a tool's exception, and where it was raised, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind, text = type(error).__name__, first_line(error)
    error_text = kind if text == kind else f"{kind}: {text}"
    return f"the {name} tool failed with {error_text}{place}; a tool may only raise ToolError (docs/tools.md)"
