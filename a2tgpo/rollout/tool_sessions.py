"""The sessions of tools. A session keeps a state between the calls of one trajectory."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.environment.tool import Session, SessionTool, ToolError
from a2tgpo.io.errors import first_line
from a2tgpo.lifecycle.workers import Call as Work
from a2tgpo.lifecycle.workers import CallsHangError, Workers
from a2tgpo.trajectory import Call, Prompt

NUM_CLOSERS = 4
"""Number of trajectories whose sessions are closed at the same time."""
CLOSE_S = 10.0
"""Longest wait in seconds at the end of a rollout for the sessions to close."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionAnswer:
    """The answer to one call of a session."""

    parts: Sequence[str]
    score: float | None
    """The session's score after the call, if it gives one."""


class TrajectorySessions:
    """The sessions of one trajectory. Each session opens at the first call of its tool. Only one call runs at a time.

    Args:
        past_calls: calls of the trajectory in earlier rollouts. To restore its state, a new session repeats the past
            calls that its tool answered.
    """

    def __init__(self, prompt: Prompt, past_calls: Sequence[Call] = ()):
        self._prompt = prompt
        self._past = past_calls
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}
        self._is_closed = False
        self.queue: deque[Work] = deque()
        """Calls that have not begun, because an earlier call of the trajectory has not ended."""
        self.has_call = False
        """Whether a call of the trajectory has begun and not ended."""
        self.hangs = False
        """Whether a call did not return in time. The call may still use its session, so no other call begins."""

    @property
    def num_open(self) -> int:
        return len(self._open)

    def call(self, name: str, tool: SessionTool, text: str) -> SessionAnswer:
        """Return the answer to a call.

        Raises:
            ToolError: if the call has no answer, if an earlier call hangs, or if the sessions are closed.
        """
        if self.hangs:
            raise ToolError("an earlier call of its session did not return")
        with self._lock:
            if self._is_closed:
                raise ToolError("its session is closed")
            if name not in self._open:
                self._open[name] = self._start(name, tool)
            session = self._open[name]
            parts = session.call(text)
            score = getattr(session, "score", None)
            if score is not None and not callable(score):
                raise TypeError(f"`score` of its session is {score!r:.80}, not a method")
            return SessionAnswer(parts=parts, score=None if score is None else score())

    def close(self) -> list[str]:
        """Wait for the running call, and close all sessions. Return one line for each failure to close."""
        problems = []
        with self._lock:
            self._is_closed = True
            for name in list(self._open):
                try:
                    self._open[name].close()
                except Exception as error:
                    problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")
                del self._open[name]
        return problems

    def _start(self, name: str, tool: SessionTool) -> Session:
        session = tool.open(json.loads(self._prompt.record), self._prompt.question)
        if missing := [
            method for method in ("call", "close") if not callable(getattr(session, method, None))
        ]:
            raise TypeError(f"`open` returned {session!r:.80}, which has no method {missing[0]}")
        try:
            for call in self._past:
                if call.tool == name and call.problem is None and not call.failed:
                    session.call(call.arguments)
        except BaseException:
            session.close()
            raise
        return session


class OpenSessions:
    """The sessions of all trajectories of a rank, until they are closed. Only one thread may use this object.

    Args:
        deadline_s: longest wait in seconds for the sessions of one trajectory to close.
    """

    def __init__(self, *, deadline_s: float):
        self._closers = Workers("tool session", NUM_CLOSERS, deadline_s=deadline_s)
        self._used: dict[int, TrajectorySessions] = {}
        """The sessions that were called and whose closing has not begun."""
        self._closing: dict[int, TrajectorySessions] = {}
        self._num_begun = 0
        self._num_failed = 0

    def add(self, sessions: TrajectorySessions) -> None:
        """Record that `sessions` gets a call."""
        self._used[id(sessions)] = sessions

    def close(self, sessions: TrajectorySessions) -> None:
        """Begin to close `sessions`, and drop its queued calls."""
        if self._used.pop(id(sessions), None) is not None:
            sessions.queue.clear()
            self._closing[self._num_begun] = sessions
            self._closers.submit(Work(key=self._num_begun, name="session", run=sessions.close))
            self._num_begun += 1

    def close_all(self) -> None:
        for sessions in list(self._used.values()):
            self.close(sessions)

    def take_leaks(self) -> int:
        """Wait up to `CLOSE_S` for the sessions that are being closed, and return how many sessions are left open.

        A session that failed to close is counted in one call only. Other open sessions are counted in every call.
        """
        end = time.monotonic() + CLOSE_S
        while self._closing and (left_s := end - time.monotonic()) > 0:
            try:
                closed = self._closers.take(timeout_s=left_s)
            except CallsHangError as error:
                logger.warning("warning: %s", error)
                self._num_failed += sum(sessions.num_open for sessions in self._closing.values())
                self._closing.clear()
                break
            for work in closed:
                self._take(work)
        leaks = self._num_failed + sum(
            sessions.num_open for sessions in (*self._closing.values(), *self._used.values())
        )
        self._num_failed = 0
        return leaks

    def _take(self, work: Work) -> None:
        sessions = self._closing.pop(work.key, None)
        if sessions is None:  # given up earlier, because too many sessions did not close
            return
        problems = work.result or []
        if work.is_late:
            problems = [f"it has not closed, {sessions.num_open} left open"]
        self._num_failed += sessions.num_open if work.is_late else len(problems)
        for problem in problems:
            logger.warning("warning: a session of a tool could not be closed: %s", problem)

    def shut_down(self) -> None:
        """Close all sessions, wait for them up to `CLOSE_S`, and stop the threads."""
        self.close_all()
        self.take_leaks()
        self._closers.close()
