"""Tool calls in the background, their answers in one order for all ranks of an engine."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from a2tgpo.environment.tool import ToolError, Toolset
from a2tgpo.error_line import first_line
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.outage import Outage
from a2tgpo.rollout.held_calls import HeldCalls
from a2tgpo.rollout.tool_workers import Call, ToolsHangError, ToolWorkers

WAIT_S = 1.0
"""Longest wait for an answer in one call of `ToolPool.results`: the caller has other things to look at."""
IDLE_S = 0.1
"""The same where every call is held, so that no thread can bring one."""


class ToolFaultError(RuntimeError):
    """A tool has a bug, or hangs too often; one line, raised on all ranks that share the engine."""


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """The answer to one call."""

    key: int
    """What `ToolPool.submit` returned."""
    parts: tuple[str, ...] = ()
    error: str | None = None
    """Why the call failed, one line; None if it did not."""
    is_late: bool = False
    """It failed since it had not returned at its deadline."""


class ToolPool:
    """Runs tool calls in threads and hands their answers out as they arrive.

    Where several ranks share an engine, only the first of them calls tools and looks at the clock; what it hands out,
    faults included, is broadcast, since the ranks' schedulers must see the same requests in the same order. All ranks
    of `replica_group` then make the same calls in the same order.

    A call whose service is out of service is made again until it is served, where the toolset says so: it is then
    pending for longer, which the other ranks do not notice.

    Args:
        toolset: the tools and their limits.
        replica_group: the ranks that share the engine; None if there is only one.
        clock: seconds, never going back; for deadlines and `waited_s`.
    """

    def __init__(
        self,
        toolset: Toolset,
        *,
        replica_group: dist.ProcessGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tools = toolset.tools
        self._workers = ToolWorkers(toolset.num_workers, deadline_s=toolset.deadline_s, clock=clock)
        self._late = f"no answer within {toolset.deadline_s:g} s"
        self._clock = clock
        self.outage = Outage(limit_s=toolset.outage_limit_s or 0.0, clock=clock)
        """The wait for a service, on all ranks of the engine; its limit is for the caller to look at."""
        self._held = None if toolset.outage_limit_s is None else HeldCalls(self.outage, clock=clock)
        self._group = replica_group
        self._leads = replica_group is None or dist.get_rank(replica_group) == 0
        self._pending: set[int] = set()
        self._num_submitted = 0
        self.waited_s = 0.0
        """Time spent in `results` with nothing else to do, seconds."""

    def submit(self, name: str, text: str) -> int:
        """Call the tool `name` with `text`; the key that its answer will carry, never used again."""
        key = self._num_submitted
        self._num_submitted += 1
        self._pending.add(key)
        if self._leads:
            self._workers.submit(
                Call(key=key, name=name, run=functools.partial(self._tools[name].call, text))
            )
        return key

    def results(self, *, wait: bool) -> list[ToolResult]:
        """Answers that have arrived since the last call; with `wait`, after up to `WAIT_S` if there are none yet.

        Raises:
            ToolFaultError: if a tool raised anything but `ToolError`, or too many calls hang.
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
        """Hand out no answer to any call made so far."""
        self._pending.clear()
        self._workers.drop_all()
        if self._held is not None:
            self._held.drop_all()

    def close(self) -> None:
        """Drop what is pending; threads that hang in a call are left to their end."""
        self._workers.close()

    def _collect(self, wait: bool) -> tuple[list[ToolResult], str | None]:
        """Answers, and what ends the run."""
        start = self._clock()
        try:
            calls = self._take(wait)
            self.waited_s += self._clock() - start if wait else 0.0
            return [self._result(call) for call in calls], None
        except (ToolsHangError, ToolFaultError) as error:
            return [], str(error)

    def _take(self, wait: bool) -> list[Call]:
        """Calls that have ended and are not held, after up to `WAIT_S` if there are none yet."""
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
        return ToolResult(key=call.key, parts=tuple(call.parts))


def _fault(name: str, error: Exception) -> str:
    """What was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind, text = type(error).__name__, first_line(error)
    said = kind if text == kind else f"{kind}: {text}"
    return f"the {name} tool failed with {said}{place}; a tool may only raise ToolError (docs/tools.md)"
