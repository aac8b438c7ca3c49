"""Run tool calls in the background. All ranks of an engine receive the answers in the same order."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.environment.tool import AnyTool, SessionTool, Tool, ToolError, Toolset, users_file
from a2tgpo.io.errors import first_line
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.workers import Call, CallsHangError, Workers
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.rollout.held_calls import HeldCalls
from a2tgpo.rollout.tool_sessions import OpenSessions, SessionAnswer, TrajectorySessions
from a2tgpo.trajectory import Call as PolicyCall
from a2tgpo.trajectory import Prompt

MAX_PARTS = 256
"""Largest number of parts of an answer that are read. Further parts are dropped, because reading them would take
long."""
WAIT_S = 1.0
"""Longest wait of one call of `ToolPool.results`, in seconds."""
IDLE_S = 0.1
"""Seconds of one wait while no call can run, because all calls that have begun are held."""


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
    score: float | None = None
    """The score that the call's session gave after the call."""


class ToolPool:
    """Run tool calls in threads, and return their answers as they arrive.

    The ranks of an engine must make the same calls in the same order. Only the first rank calls tools and reads
    the clock. This rank broadcasts answers and faults, because the schedulers of all ranks must see the same requests
    in the same order.

    If the toolset has an outage limit, a call to an unavailable service is retried until the service answers.

    The first rank also keeps the tools' sessions. The calls of one trajectory to tools with sessions run one after
    another, in the order of their submission.

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
        self._toolset, self._tools = toolset, toolset.tools
        self._workers = Workers(
            "tool", toolset.max_concurrent_calls, deadline_s=toolset.call_timeout_s, clock=clock
        )
        self._late = f"no answer within {toolset.call_timeout_s:g} s"
        self._clock = clock
        self.outage = Outage(limit_s=toolset.outage_limit_s or 0.0, clock=clock)
        """The record of waits for a service, equal on all ranks of the engine. The record has a limit,
        which the caller must enforce."""
        self._held = None if toolset.outage_limit_s is None else HeldCalls(self.outage, clock=clock)
        self._group = engine_group.group
        self._leads = engine_group.is_leader
        self._has_sessions = any(isinstance(tool, SessionTool) for tool in self._tools.values())
        self._open = OpenSessions(deadline_s=toolset.call_timeout_s)
        self._sessions_of: dict[int, TrajectorySessions] = {}
        """Maps the key of a session's call to all sessions of the call's trajectory."""
        self._pending: set[int] = set()
        self._num_submitted = 0
        self.waited_s = 0.0
        """Seconds spent in calls of `results` with `wait=True`."""

    def sessions_for(
        self, prompt: Prompt, past_calls: Sequence[PolicyCall] = ()
    ) -> TrajectorySessions | None:
        """Return the sessions of a new or continued trajectory, or None if no tool has sessions.

        `end` must be called when the rollout of the trajectory ends or pauses.

        Args:
            past_calls: the trajectory's calls in earlier rollouts.
        """
        if not self._has_sessions:
            return None
        return TrajectorySessions(prompt, past_calls)

    def submit(self, name: str, text: str, sessions: TrajectorySessions | None = None) -> int:
        """Queue a call of the tool `name` with `text`, and return a unique key for the answer.

        Args:
            sessions: the trajectory's sessions, from `sessions_for`.
        """
        key = self._num_submitted
        self._num_submitted += 1
        self._pending.add(key)
        if not self._leads:
            return key
        tool = self._tools[name]
        if not isinstance(tool, SessionTool):
            self._workers.submit(Call(key=key, name=name, run=functools.partial(_answer, tool, text)))
            return key
        assert sessions is not None, f"{name} has sessions"
        self._open.add(sessions)
        self._sessions_of[key] = sessions
        run = functools.partial(_session_answer, sessions, name, tool, text)
        sessions.queue.append(Call(key=key, name=name, run=run))
        self._begin_next(sessions)
        return key

    def end(self, sessions: TrajectorySessions | None) -> None:
        """Close the sessions of a trajectory in the background."""
        if sessions is not None:
            self._open.close(sessions)

    def take_counts(self) -> dict[str, float]:
        """Wait for the sessions of ended trajectories to close. Return the tools' counts since the last call."""
        counts = self._toolset.take_counts()
        if self._has_sessions:
            counts["tools/open_sessions"] = self._open.take_leaks()
        return counts

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
        """Discard the pending calls, and close all sessions in the background."""
        self._pending.clear()
        self._workers.drop_all()
        if self._held is not None:
            self._held.drop_all()
        self._sessions_of.clear()
        self._open.close_all()

    def close(self) -> None:
        """Discard the pending calls and close all sessions. A thread that hangs in a call ends when the call does."""
        self._workers.close()
        self._open.shut_down()

    def _begin_next(self, sessions: TrajectorySessions) -> None:
        """Begin the next call of the trajectory to a tool with sessions, if no such call is running."""
        if not sessions.has_call and sessions.queue:
            sessions.has_call = True
            self._workers.submit(sessions.queue.popleft())

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
        """Return the ended calls that are not held. If `wait` is true, wait up to `WAIT_S` for one."""
        if self._held is None:
            return self._workers.take(timeout_s=WAIT_S if wait else 0.0)
        for call in self._held.take_due():
            self._workers.submit(call)
        if wait and self._workers.is_idle:  # a call on hold may keep later calls of its trajectory waiting
            time.sleep(IDLE_S)
        return self._held.keep(self._workers.take(timeout_s=WAIT_S if wait else 0.0))

    def _result(self, call: Call) -> ToolResult:
        if (sessions := self._sessions_of.pop(call.key, None)) is not None:
            sessions.has_call, sessions.hangs = False, sessions.hangs or call.is_late
            self._begin_next(sessions)
        if call.is_late:
            return ToolResult(key=call.key, error=self._late, is_late=True)
        if isinstance(call.error, ToolError):
            return ToolResult(key=call.key, error=str(call.error))
        if call.error is not None:
            raise ToolFaultError(_fault(call.name, self._tools[call.name], call.error))
        return ToolResult(key=call.key, parts=call.result.parts, score=call.result.score)


def _answer(tool: Tool, text: str) -> SessionAnswer:
    return _checked(SessionAnswer(parts=tool.call(text), score=None))


def _session_answer(sessions: TrajectorySessions, name: str, tool: SessionTool, text: str) -> SessionAnswer:
    return _checked(sessions.call(name, tool, text))


def _checked(answer: SessionAnswer) -> SessionAnswer:
    """Return `answer`, with its first `MAX_PARTS` parts as a tuple.

    Raises:
        TypeError: if the parts are not a non-empty list of texts, or if the score is not a finite number.
    """
    parts = answer.parts
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"it returned {parts!r:.80}, not a list of at least one text")
    score = answer.score
    if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
        raise TypeError(f"the score of its session is {score!r:.80}, not a finite number")
    return dataclasses.replace(
        answer, parts=tuple(parts[:MAX_PARTS]), score=None if score is None else float(score)
    )


def _fault(name: str, tool: AnyTool, error: BaseException) -> str:
    """Describe a tool's exception, and where it was raised, in one line. If the tool is the user's, the place is in
    the user's file.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == users_file(tool)] or frames
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    kind, text = type(error).__name__, first_line(error)
    error_text = kind if text == kind else f"{kind}: {text}"
    return f"the {name} tool failed with {error_text}{place}; a tool may only raise ToolError (docs/tools.md)"
