"""Play trajectories, and compute the rewards and gains of each trajectory when it finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from a2tgpo.lifecycle.process_age import process_age_s
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import RewardFaultError
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout, Playing, RolloutInterruptedError
from a2tgpo.trajectory import Prompt, Trajectory

WAIT_S = 1.0
"""Seconds for which the leader waits for a reward before all ranks of the engine decide whether to go on."""


class RewardedRollout:
    """Plays on this rank's engine, and scores each trajectory that finishes.

    All ranks of the engine must make the same calls. Only the leader computes rewards, during the rollout. On the
    other ranks, trajectories have no reward.

    Args:
        rollout: plays the trajectories.
        reward: sets the fields of the trajectories.
        pool: runs the rewards.
        seed: seed of the run.
        score_gain: whether the engine scores the gold answers.
        should_stop: returns whether to interrupt the rollout (see `GroupRollout.finished`). None means never.
        engine_group: the ranks that share the engine.
    """

    def __init__(
        self,
        rollout: GroupRollout,
        reward: TrajectoryReward,
        pool: RewardPool,
        *,
        seed: int,
        score_gain: bool = True,
        should_stop: Callable[[], bool] | None = None,
        engine_group: EngineGroup = ALONE,
    ):
        self._rollout = rollout
        self._reward = reward
        self._pool = pool
        self._seed = seed
        self._score_gain = score_gain
        self._should_stop = should_stop
        self._engine_group = engine_group
        self._unjudged: dict[int, Trajectory] = {}
        """Trajectories whose rewards are being computed, by their keys in the pool."""
        self._fault = ""
        """A reward's bug in one line, or an empty text. A bug must end the run."""
        self.first_finished_s: float | None = None
        """Age of this process in seconds when its first trajectory finished. None until then."""

    def play(self, prompts: Sequence[Prompt], *, version: int, counts: RolloutCounts) -> list[Trajectory]:
        """Play a group of trajectories for each prompt, and return all trajectories, by prompt and then by sample.

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the rollout was interrupted.
            RewardFaultError: on all ranks of the engine, if a reward has a bug or hangs too often.
        """
        playing = self._rollout.play(
            prompts, seed=self._seed, version=version, score_gain=self._score_gain, counts=counts
        )
        finished = self._score(playing, counts)
        return sorted(finished, key=lambda trajectory: (trajectory.prompt_index, trajectory.sample_index))

    def play_on(
        self,
        groups: Sequence[CarriedGroup],
        *,
        budgets: Sequence[int | None],
        version: int,
        counts: RolloutCounts,
    ) -> list[CarriedGroup]:
        """Continue `groups` within their token `budgets` (see `GroupRollout.play_on`), and return the groups.

        Trajectories that are still unfinished get no reward.

        Raises:
            RolloutInterruptedError, RewardFaultError: as in `play`.
        """
        played, playing = self._rollout.play_on(
            groups,
            budgets=budgets,
            seed=self._seed,
            version=version,
            score_gain=self._score_gain,
            counts=counts,
        )
        self._score(playing, counts)
        return played

    def _score(self, playing: Playing, counts: RolloutCounts) -> list[Trajectory]:
        trajectories = []
        should_stop = None if self._should_stop is None else self._is_stopped
        try:
            for done in self._rollout.finished(playing, should_stop=should_stop):
                trajectories.append(done.trajectory)
                if self.first_finished_s is None:
                    self.first_finished_s = process_age_s()
                episode = self._reward.begin(
                    done.trajectory, done.prompt, done.turn_texts, done.context_logprobs
                )
                if self._engine_group.is_leader:
                    self._unjudged[self._pool.submit(episode)] = done.trajectory
                    self._judge(timeout_s=0.0)
            self._await_rewards(counts)
        except RolloutInterruptedError:
            self._raise_fault()
            raise
        finally:
            self._unjudged.clear()
            self._pool.drop_all()
        counts.reward_counts.update(self._pool.take_counts())
        counts.failed_rewards += sum(t.reward_error is not None for t in trajectories)
        return trajectories

    def _is_stopped(self) -> bool:
        return bool(self._fault) or (self._should_stop is not None and self._should_stop())

    def _judge(self, *, timeout_s: float) -> None:
        """Set the rewards that have been computed. If there are none, wait up to `timeout_s` for a first reward."""
        try:
            for key, verdict in self._pool.take(timeout_s=timeout_s):
                self._reward.finish(self._unjudged.pop(key), verdict)
        except RewardFaultError as error:
            self._fault = str(error)

    def _await_rewards(self, counts: RolloutCounts) -> None:
        """Wait until all trajectories of the engine have their rewards. All ranks of the engine must call this."""
        start = time.monotonic()
        while self._engine_group.any(bool(self._unjudged)):
            if self._unjudged and not self._fault:
                self._judge(timeout_s=WAIT_S)
            if self._engine_group.any(self._is_stopped()):
                raise RolloutInterruptedError
        counts.reward_wait_s += time.monotonic() - start

    def _raise_fault(self) -> None:
        """If the leader's rewards have a fault, raise this fault on all ranks of the engine."""
        fault, group = self._fault, self._engine_group.group
        self._fault = ""
        if group is not None:
            fault = broadcast_object(fault, group, source=0)
        if fault:
            raise RewardFaultError(fault)
