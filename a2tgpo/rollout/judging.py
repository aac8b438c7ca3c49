"""Wait for the verdicts on finished trajectories, in step with the other ranks of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.reward.episode import Episode
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.total import RewardFaultError, Verdict
from a2tgpo.rollout.group_rollout import RolloutInterruptedError

WAIT_S = 1.0
"""Seconds for which the leader waits for a verdict before all ranks of the engine decide whether to go on."""
Item = TypeVar("Item")


class Judging(Generic[Item]):
    """The items of one rollout, such as trajectories, that wait for the verdicts on their episodes.

    All ranks of the engine make the same calls, inside a `with` statement around the rollout. Only the leader
    computes verdicts. On the other ranks, and without `pool`, no item waits, and each verdict is None.

    If a reward has a fault, the rollout is interrupted, and the `with` statement raises `RewardFaultError` on all
    ranks of the engine in place of `RolloutInterruptedError`.

    Args:
        pool: runs the rewards. None: there are no rewards.
        should_stop: returns whether to interrupt the rollout. None means never.
    """

    def __init__(
        self, pool: RewardPool | None, engine_group: EngineGroup, *, should_stop: Callable[[], bool] | None
    ):
        self._pool = pool if engine_group.is_leader else None
        self._engine_group = engine_group
        self._is_stop_requested = should_stop
        self._waiting: dict[int, Item] = {}
        """The items without a verdict, by their keys in the pool."""
        self._fault = ""
        """What is wrong with a reward, in one line; empty if nothing is wrong."""

    def __enter__(self) -> Judging[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.drop_all()
        if kind is RolloutInterruptedError:
            self._raise_fault()

    @property
    def should_stop(self) -> Callable[[], bool] | None:
        """The `should_stop` for `GroupRollout.finished`. If it is not None, it also returns True after a fault."""
        return None if self._is_stop_requested is None else self._is_stopped

    def judge(self, item: Item, episode: Episode) -> list[tuple[Item, Verdict | None]]:
        """Begin to judge `item` by its `episode`, and return the items that have been judged since the last call."""
        if self._pool is None:
            return [(item, None)]
        self._waiting[self._pool.submit(episode)] = item
        return self._take(timeout_s=0.0)

    def rest(self) -> Iterator[tuple[Item, Verdict | None]]:
        """Wait until all items of the engine have been judged, and yield each item with its verdict.

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the wait was interrupted.
        """
        is_waiting = self._engine_group.any(bool(self._waiting))
        while is_waiting:
            yield from self._take(timeout_s=WAIT_S)
            is_stopped = self._engine_group.any(self._is_stopped())
            is_waiting = self._engine_group.any(bool(self._waiting))
            if is_waiting and is_stopped:  # a whole rollout is worth keeping, even if the run stops
                raise RolloutInterruptedError

    def _take(self, *, timeout_s: float) -> list[tuple[Item, Verdict | None]]:
        """Return the items that have been judged. If there are none, wait up to `timeout_s` for a first item."""
        if self._pool is None or not self._waiting or self._fault:
            return []
        try:
            judged = self._pool.take(timeout_s=timeout_s)
        except RewardFaultError as error:
            self._fault = str(error)
            return []
        return [(self._waiting.pop(key), verdict) for key, verdict in judged]

    def _is_stopped(self) -> bool:
        return bool(self._fault) or (self._is_stop_requested is not None and self._is_stop_requested())

    def _raise_fault(self) -> None:
        """If the leader's rewards have a fault, raise this fault on all ranks of the engine."""
        fault, group = self._fault, self._engine_group.group
        if group is not None:
            fault = broadcast_object(fault, group, source=0)
        if fault:
            raise RewardFaultError(fault) from None
