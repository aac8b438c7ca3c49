"""Tool calls in the background, their answers in one order for all ranks of an engine."""

from __future__ import annotations

import contextlib
import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.environment.tool import ToolError, Toolset
from a2tgpo.parallel.collectives import broadcast_object


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """The answer to one call."""

    key: int
    """What `ToolPool.submit` returned."""
    parts: tuple[str, ...] = ()
    error: str | None = None
    """Why the call failed, one line; None if it did not."""


class ToolPool:
    """Runs tool calls in threads and hands their answers out as they arrive.

    Where several ranks share an engine, only the first of them calls tools, and what it hands out is broadcast:
    the ranks' schedulers must see the same requests in the same order. All ranks of `replica_group` then
    make the same calls in the same order.

    Args:
        toolset: the tools and their limits; an answer that comes after its deadline is dropped.
        replica_group: the ranks that share the engine; None if there is only one.
    """

    def __init__(
        self,
        toolset: Toolset,
        *,
        replica_group: dist.ProcessGroup | None = None,
    ):
        self._tools = toolset.tools
        self._executor = ThreadPoolExecutor(toolset.num_workers, thread_name_prefix="tool")
        self._deadline_s = toolset.deadline_s
        self._group = replica_group
        self._leads = replica_group is None or dist.get_rank(replica_group) == 0
        self._answers: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._submitted: dict[int, float] = {}  # key of a pending call -> when it was submitted
        self._last_arrival = 0.0
        self._num_submitted = 0
        self.waited_s = 0.0
        """Time spent in `results` with nothing else to do, seconds."""

    def submit(self, name: str, text: str) -> int:
        """Call the tool `name` with `text`; the key that its answer will carry, never used again."""
        key = self._num_submitted
        self._num_submitted += 1
        self._submitted[key] = time.monotonic()
        if self._leads:
            future = self._executor.submit(self._tools[name].call, text)
            future.add_done_callback(lambda done: self._answers.put((key, done)))
        return key

    def results(self, *, wait: bool) -> list[ToolResult]:
        """Answers that have arrived since the last call; with `wait`, at least one if any call is pending.

        Raises:
            Exception: whatever a tool raised other than `ToolError`, which is a fault of the program.
        """
        if not self._submitted:
            return []
        arrived = self._collect(wait) if self._leads else []
        if self._group is not None:
            arrived = broadcast_object(arrived, self._group, source=0)
        for result in arrived:
            del self._submitted[result.key]
        return arrived

    def close(self) -> None:
        """Drop what is pending; threads that hang in a call are left to their end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _collect(self, wait: bool) -> list[ToolResult]:
        arrived = self._take_arrived(timeout_s=0.0)
        while wait and not arrived:
            start = time.monotonic()
            next_deadline = min(self._deadline(key) for key in self._submitted)
            arrived = self._take_arrived(timeout_s=max(0.0, next_deadline - start))
            self.waited_s += time.monotonic() - start
            arrived = arrived or self._take_late()
        return arrived or self._take_late()

    def _take_arrived(self, *, timeout_s: float) -> list[ToolResult]:
        """What lies in the queue; waits up to `timeout_s` for a first answer."""
        arrived = []
        with contextlib.suppress(queue.Empty):
            while True:
                key, done = self._answers.get(timeout=timeout_s) if timeout_s else self._answers.get_nowait()
                timeout_s = 0.0
                self._last_arrival = time.monotonic()
                if key in self._submitted:  # else it was given up before
                    arrived.append(_to_result(key, done))
        return arrived

    def _take_late(self) -> list[ToolResult]:
        now = time.monotonic()
        reason = f"no answer within {self._deadline_s:g} s"
        late = [key for key in self._submitted if self._deadline(key) <= now]
        return [ToolResult(key=key, error=reason) for key in late]

    def _deadline(self, key: int) -> float:
        # While answers arrive, a call that is still queued behind others is not late.
        return max(self._submitted[key], self._last_arrival) + self._deadline_s


def _to_result(key: int, done: Future) -> ToolResult:
    try:
        return ToolResult(key=key, parts=tuple(done.result()))
    except ToolError as error:
        return ToolResult(key=key, error=str(error))
