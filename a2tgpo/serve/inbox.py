"""A bounded queue of questions, each with a future for its answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from a2tgpo.trajectory import Prompt, Trajectory


class InboxFullError(Exception):
    """Raised if the queue is full."""


class InboxClosedError(Exception):
    """Raised if the queue is closed."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A question for the agent."""

    prompt: Prompt
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class Played:
    """The result of an `Order`."""

    trajectory: Trajectory
    texts: tuple[str, ...]
    """The text that the policy wrote in each turn."""


@dataclass(kw_only=True)
class Waiting:
    order: Order
    answer: Future[Played] = field(default_factory=Future)


class Inbox:
    """A queue of at most `max_waiting` orders between the threads that accept requests and the thread that plays."""

    def __init__(self, *, max_waiting: int):
        self._max_waiting = max_waiting
        self._waiting: deque[Waiting] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, order: Order) -> Future[Played]:
        """Add `order` to the queue, and return a future for its result.

        Raises:
            InboxFullError: if the queue is full.
            InboxClosedError: if the queue is closed.
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
        """Return up to `most` orders, oldest first; none if no order comes within `timeout_s` seconds.

        All returned orders are greedy, or all are sampled. An order whose client has left is skipped.
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
        """Accept no more orders, and end each waiting order with `InboxClosedError`."""
        with self._changed:
            self._is_closed = True
            for entry in self._waiting:
                if entry.answer.set_running_or_notify_cancel():
                    entry.answer.set_exception(InboxClosedError())
            self._waiting.clear()
            self._changed.notify_all()
