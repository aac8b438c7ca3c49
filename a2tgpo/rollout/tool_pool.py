"""Searches in the background, their answers in one order for all ranks of an engine."""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.search.errors import SearchError
from a2tgpo.search.passage import Passage
from a2tgpo.search.tool import SearchTool


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """The answer to one query."""

    key: int
    """What `ToolPool.submit` was given."""
    passages: tuple[Passage, ...] = ()
    error: str | None = None
    """Why the search failed, one line; None if it did not."""


class ToolPool:
    """Runs searches in threads and hands their answers out as they arrive.

    Where several ranks share an engine, only the first of them searches, and what it hands out is broadcast:
    the ranks' schedulers must see the same requests in the same order. All ranks of `replica_group` then
    make the same calls in the same order.

    Args:
        search: the tool; safe to call from many threads.
        num_workers: searches in flight.
        deadline_s: a search without an answer by then has failed, seconds; a late answer is dropped.
        replica_group: the ranks that share the engine; None if there is only one.
    """

    def __init__(
        self,
        search: SearchTool,
        *,
        num_workers: int,
        deadline_s: float,
        replica_group: dist.ProcessGroup | None = None,
    ):
        self._search = search
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="search")
        self._deadline_s = deadline_s
        self._group = replica_group
        self._leads = replica_group is None or dist.get_rank(replica_group) == 0
        self._answers: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._deadlines: dict[int, float] = {}
        self.waited_s = 0.0
        """Time spent in `results` with nothing else to do, seconds."""

    @property
    def num_pending(self) -> int:
        """Searches submitted whose answer was not handed out yet; equal on all ranks of the group."""
        return len(self._deadlines)

    def submit(self, key: int, query: str) -> None:
        """Start a search; its answer carries `key`, which must not be pending already."""
        assert key not in self._deadlines, f"a search for key {key} is pending"
        self._deadlines[key] = time.monotonic() + self._deadline_s
        if self._leads:
            future = self._executor.submit(self._search.search, query)
            future.add_done_callback(lambda done: self._answers.put((key, done)))

    def results(self, *, wait: bool) -> list[ToolResult]:
        """Answers that have arrived since the last call; with `wait`, at least one if any search is pending.

        Raises:
            Exception: whatever a search raised other than `SearchError`, which is a fault of the program.
        """
        if not self._deadlines:
            return []
        arrived = self._collect(wait) if self._leads else []
        if self._group is not None:
            arrived = broadcast_object(arrived, self._group, source=0)
        for result in arrived:
            del self._deadlines[result.key]
        return arrived

    def close(self) -> None:
        """Drop what is pending; threads that hang in a search are left to their end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _collect(self, wait: bool) -> list[ToolResult]:
        arrived: dict[int, ToolResult] = {}
        while True:
            try:
                key, done = self._answers.get_nowait()
            except queue.Empty:
                now = time.monotonic()
                late = [k for k, deadline in self._deadlines.items() if deadline <= now and k not in arrived]
                for key in late:
                    reason = f"no answer within {self._deadline_s:g} s"
                    arrived[key] = ToolResult(key=key, error=reason)
                if arrived or not wait:
                    return list(arrived.values())
                self._wait_for_answer(min(self._deadlines.values()) - now)
                continue
            if key in self._deadlines and key not in arrived:
                arrived[key] = _to_result(key, done)

    def _wait_for_answer(self, timeout_s: float) -> None:
        start = time.monotonic()
        try:
            self._answers.put(self._answers.get(timeout=timeout_s))
        except queue.Empty:
            return  # the deadline has passed; the caller looks at the clock again
        finally:
            self.waited_s += time.monotonic() - start


def _to_result(key: int, done: Future) -> ToolResult:
    try:
        return ToolResult(key=key, passages=tuple(done.result()))
    except SearchError as error:
        return ToolResult(key=key, error=str(error))
