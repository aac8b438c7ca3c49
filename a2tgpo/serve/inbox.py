"""Questions that wait to be played, a bounded number of them, and where their answers go."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from a2tgpo.trajectory import Prompt, Trajectory


class InboxFullError(Exception):
    """As many questions wait as may."""


class InboxClosedError(Exception):
    """Nothing is played any more."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One question to be played."""

    prompt: Prompt
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came of an order."""

    trajectory: Trajectory
    texts: tuple[str, ...]
    """What the policy wrote, turn by turn."""


@dataclass(kw_only=True)
class Waiting:
    order: Order
    answer: Future[Played] = field(default_factory=Future)


class Inbox:
    """Between the threads that take requests and the one that plays.

    Args:
        max_waiting: questions that may wait to be played.
    """

    def __init__(self, *, max_waiting: int):
        self._max_waiting = max_waiting
        self._waiting: deque[Waiting] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, order: Order) -> Future[Played]:
        """Where what comes of `order` will be.

        Raises:
            InboxFullError: too many wait.
            InboxClosedError: it is closed.
        """
        waiting = Waiting(order=order)
        with self._changed:
            if self._is_closed:
                raise InboxClosedError
            if len(self._waiting) >= self._max_waiting:
                raise InboxFullError
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.answer

    def take(self, most: int, *, timeout_s: float) -> list[Waiting]:
        """Up to `most` that are played alike (greedy or drawn), the longest waiting first.

        Those whose client has gone are left out. Empty where none came within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._waiting = deque(entry for entry in self._waiting if not entry.answer.cancelled())
                if self._waiting:
                    break
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._is_closed:
                    return []
                self._changed.wait(left_s)
            is_greedy = self._waiting[0].order.is_greedy
            alike = [entry for entry in self._waiting if entry.order.is_greedy == is_greedy][:most]
            chosen = {id(entry) for entry in alike}
            self._waiting = deque(entry for entry in self._waiting if id(entry) not in chosen)
        return [entry for entry in alike if entry.answer.set_running_or_notify_cancel()]

    def close(self) -> None:
        """Take no more questions, and refuse those that wait."""
        with self._changed:
            self._is_closed = True
            for entry in self._waiting:
                if entry.answer.set_running_or_notify_cancel():
                    entry.answer.set_exception(InboxClosedError())
            self._waiting.clear()
            self._changed.notify_all()
