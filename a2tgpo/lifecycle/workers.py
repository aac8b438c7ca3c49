"""Threads that run calls of tools and rewards, including calls that hang.

The clock of a call's deadline starts when the call starts, not when the call is submitted. If a call exceeds its
deadline, the call's thread is abandoned, and a new thread replaces it. When the call returns, its answer is discarded
and its thread ends. All threads are daemons, so a hanging thread does not keep the process alive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HUNG_PER_WORKER = 4
"""Largest number of abandoned threads per worker that may hang at the same time."""


class CallsHangError(RuntimeError):
    """Raised, with a one-line message, if so many calls hang that no more threads may start."""


@dataclass(eq=False)
class Call:
    """One call, from its submission to its outcome."""

    key: int
    """A key by which the caller recognises the call in the result of `Workers.take`."""
    name: str
    """Name of the tool or reward that is called."""
    run: Callable[[], Any]
    started: float = 0.0
    """Time on the workers' clock at which a thread started the call."""
    result: Any = None
    error: BaseException | None = None
    is_late: bool = False
    """Whether the call was abandoned because it exceeded its deadline."""
    is_wanted: bool = True
    """Whether `Workers.take` must still return this call."""


class Workers:
    """Run calls in up to `num_workers` threads. Only one thread may submit and take calls.

    Args:
        kind: "tool" or "reward", for messages and names of threads.
        num_workers: number of calls that run at the same time, not counting abandoned calls.
        deadline_s: seconds from the start of a call until the call is abandoned.
    """

    def __init__(
        self,
        kind: str,
        num_workers: int,
        *,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._kind = kind
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._clock = clock
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._has_outcome = threading.Condition(self._lock)
        self._queued: deque[Call] = deque()
        self._running: list[Call] = []  # in the order of the calls' starts
        self._ended: list[Call] = []
        self._num_threads = 0  # threads that run a call or wait for one
        self._num_hung = 0  # abandoned threads whose call has not returned yet
        self._closed = False

    @property
    def num_hung(self) -> int:
        """Number of threads that hang in an abandoned call."""
        return self._num_hung

    @property
    def is_idle(self) -> bool:
        """Whether `take` would return no call, however long it waited."""
        with self._lock:
            return not self._ended and not self._has_wanted()

    def submit(self, call: Call) -> None:
        with self._lock:
            self._queued.append(call)
            self._start_threads()
            self._has_work.notify()

    def take(self, *, timeout_s: float) -> list[Call]:
        """Return the calls that have ended since the last `take`, followed by the newly abandoned calls.

        Args:
            timeout_s: longest wait in seconds, if calls are pending but none has ended.

        Raises:
            CallsHangError: if more threads hang than allowed.
        """
        with self._lock:
            outcomes = self._take_ended() + self._give_up_late()
            if not outcomes and self._has_wanted():
                # If no call is running yet, assume that the next call starts now.
                first = self._running[0].started if self._running else self._clock()
                left_s = first + self._deadline_s - self._clock()
                self._has_outcome.wait(max(0.0, min(left_s, timeout_s)))
                outcomes = self._take_ended() + self._give_up_late()
            return outcomes

    def drop_all(self) -> None:
        """Discard all calls so far. Queued calls are not made, and outcomes of running calls are dropped."""
        with self._lock:
            self._queued.clear()
            self._ended.clear()
            for call in self._running:
                call.is_wanted = False

    def close(self) -> None:
        """Stop the threads. A busy thread ends when its call returns. No call may be submitted afterwards."""
        with self._lock:
            self._closed = True
            self._queued.clear()
            self._has_work.notify_all()

    def _has_wanted(self) -> bool:
        return bool(self._queued) or any(call.is_wanted for call in self._running)

    def _take_ended(self) -> list[Call]:
        ended, self._ended = self._ended, []
        return ended

    def _give_up_late(self) -> list[Call]:
        now = self._clock()
        late = [call for call in self._running if call.started + self._deadline_s <= now]
        for call in late:
            call.is_late = True
            self._running.remove(call)
            self._num_threads -= 1
            self._num_hung += 1
        allowed = HUNG_PER_WORKER * self._num_workers
        if self._num_hung > allowed:
            names = ", ".join(sorted({call.name for call in late})) or "any"
            raise CallsHangError(
                f"{self._num_hung} {self._kind} calls, the latest of {names}, have been running for more than "
                f"{self._deadline_s:g} s; allowed: {allowed} such calls; give the {self._kind} a timeout of its own"
            )
        self._start_threads()
        return [call for call in late if call.is_wanted]

    def _start_threads(self) -> None:
        """Start threads for the queued calls, but keep at most `num_workers` threads that do not hang."""
        num_idle = self._num_threads - len(self._running)
        for _ in range(min(len(self._queued) - num_idle, self._num_workers - self._num_threads)):
            self._num_threads += 1
            threading.Thread(target=self._work, name=self._kind, daemon=True).start()

    def _work(self) -> None:
        while (call := self._next_call()) is not None:
            try:
                call.result = call.run()
            except BaseException as error:  # SystemExit, too, must not end the thread without an outcome
                call.error = error
            with self._lock:
                if call.is_late:
                    self._num_hung -= 1
                    return
                self._running.remove(call)
                if call.is_wanted:
                    self._ended.append(call)
                    self._has_outcome.notify()

    def _next_call(self) -> Call | None:
        """Wait until a call is queued, and return the oldest queued call. Return None if the workers are closed."""
        with self._lock:
            while not self._queued and not self._closed:
                self._has_work.wait()
            if self._closed:
                return None
            call = self._queued.popleft()
            call.started = self._clock()
            self._running.append(call)
            return call
