"""Play trajectories, and compute the rewards and gains of each trajectory when it finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from a2tgpo.lifecycle.process_age import process_age_s
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import Verdict
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout, Playing
from a2tgpo.rollout.inner_branches import with_inner_branches
from a2tgpo.rollout.judging import Judging
from a2tgpo.trajectory import Prompt, Trajectory


class RewardedRollout:
    """Plays on this rank's engine, and scores each trajectory that finishes.

    All ranks of the engine must make the same calls. Only the leader computes rewards, during the rollout. On the
    other ranks, trajectories have no reward.

    Args:
        rollout: plays the trajectories.
        reward: sets the rewards and gains of the trajectories.
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
        self.first_finished_s: float | None = None
        """Age of this process in seconds when its first trajectory finished. None until then."""

    def play(
        self,
        prompts: Sequence[Prompt],
        *,
        version: int,
        counts: RolloutCounts,
        queue: Iterable[Prompt] = (),
    ) -> list[Trajectory]:
        """Play a group of trajectories for each prompt, and return all trajectories, sorted by prompt and sample.

        Inner branches are not in the list, but in `Trajectory.inner_branches` of their parents. The engine also plays
        the prompts that it takes from `queue` (see `GroupRollout.play`).

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the rollout was interrupted.
            RewardFaultError: on all ranks of the engine, if a reward has a bug or hangs too often.
        """
        playing = self._rollout.play(
            prompts,
            seed=self._seed,
            version=version,
            score_gain=self._score_gain,
            queue=queue,
            counts=counts,
        )
        finished = self._score(playing, counts)
        by_sample = sorted(
            finished, key=lambda trajectory: (trajectory.prompt_index, trajectory.sample_index)
        )
        return with_inner_branches(by_sample)

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
        judging = Judging[Trajectory](self._pool, self._engine_group, should_stop=self._should_stop)
        with judging:
            for done in self._rollout.finished(playing, should_stop=judging.should_stop):
                if self.first_finished_s is None:
                    self.first_finished_s = process_age_s()
                episode = self._reward.begin(
                    done.trajectory, done.prompt, done.turn_texts, done.context_logprobs
                )
                trajectories += self._finish(judging.judge(done.trajectory, episode))
            start = time.monotonic()
            trajectories += self._finish(judging.rest())
            counts.reward_wait_s += time.monotonic() - start
        counts.reward_counts.update(self._pool.take_counts())
        counts.failed_rewards += sum(t.reward_error is not None for t in trajectories)
        return trajectories

    def _finish(self, judged: Iterable[tuple[Trajectory, Verdict | None]]) -> list[Trajectory]:
        """Set the rewards of the judged trajectories, and return these trajectories."""
        trajectories = []
        for trajectory, verdict in judged:
            if verdict is not None:
                self._reward.finish(trajectory, verdict)
            trajectories.append(trajectory)
        return trajectories
