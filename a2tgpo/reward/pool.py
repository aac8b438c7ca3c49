"""Score episodes in threads, while the rollout plays further trajectories."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from a2tgpo.config.reward import RewardConfig
from a2tgpo.io.user_code import fault_line
from a2tgpo.lifecycle.workers import Call, CallsHangError, Workers
from a2tgpo.reward.episode import Episode
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.total import RewardFaultError, Verdict, judge

logger = logging.getLogger(__name__)


class RewardPool:
    """Runs the rewards of one rank in threads. Only one thread may call its methods.

    Args:
        rewards: the rewards of the run. `close` closes them.
        config: the section `reward`.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        config: RewardConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rewards = rewards
        self._judge = functools.partial(judge, rewards, format_gate=config.format_gate)
        self._late = f"no verdict within {config.timeout_s:g} s (reward.timeout_s)"
        self._workers = Workers("reward", config.num_workers, deadline_s=config.timeout_s, clock=clock)
        self._num_submitted = 0

    def submit(self, episode: Episode) -> int:
        """Begin to score `episode`, and return a unique key that identifies its verdict."""
        key = self._num_submitted
        self._num_submitted += 1
        names = ", ".join(named.label for named in self._rewards)
        self._workers.submit(Call(key=key, name=names, run=functools.partial(self._judge, episode)))
        return key

    def take(self, *, timeout_s: float) -> list[tuple[int, Verdict]]:
        """Return the keys and verdicts of the episodes that have been scored since the last call.

        Args:
            timeout_s: longest wait in seconds for a first verdict, if any episode is being scored.

        Raises:
            RewardFaultError: a reward has a bug, or too many calls hang.
        """
        try:
            return [(call.key, self._verdict(call)) for call in self._workers.take(timeout_s=timeout_s)]
        except CallsHangError as error:
            raise RewardFaultError(str(error)) from None

    def drop_all(self) -> None:
        """Discard all episodes whose verdict has not been returned."""
        self._workers.drop_all()

    def take_counts(self) -> dict[str, int]:
        """Return the counts of all rewards that have a method `take_counts`, by the names `LABEL/COUNT`.

        The counts cover the time since the last call of this method.
        """
        counts: Counter[str] = Counter()
        for named in self._rewards:
            try:
                own: dict[str, int] = getattr(named.reward, "take_counts", dict)()
                counts.update({f"{named.label}/{name}": number + 0 for name, number in own.items()})
            except Exception as error:
                raise RewardFaultError(f"reward {fault_line(error, named.path)}") from None
        return dict(counts)

    def close(self) -> None:
        """Stop the threads, and close the rewards that have a method `close`. Log a warning for each that fails."""
        self._workers.close()
        for named in self._rewards:
            try:
                getattr(named.reward, "close", _nothing)()
            except Exception as error:
                logger.warning(
                    "could not close the reward %s: %s", named.label, fault_line(error, named.path)
                )

    def _verdict(self, call: Call) -> Verdict:
        if call.is_late:
            return Verdict(error=f"{call.name}: {self._late}")
        if isinstance(call.error, RewardFaultError):
            raise call.error
        if call.error is not None:
            raise RewardFaultError(f"reward {fault_line(call.error, self._rewards[0].path)}")
        assert isinstance(call.result, Verdict)
        return call.result


def _nothing() -> None:
    """Do nothing. The pool calls this in place of a method that a reward lacks."""
