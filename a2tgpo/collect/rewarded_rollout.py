"""Play trajectories, and compute the rewards and gains of each trajectory when it finishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from a2tgpo.lifecycle.process_age import process_age_s
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout, Playing
from a2tgpo.trajectory import Prompt, Trajectory


class RewardedRollout:
    """Play on this rank's engine, and score each trajectory that finishes.

    All ranks of the engine must make the same calls.

    Args:
        seed: seed of the run.
        should_stop: returns whether to interrupt the rollout (see `GroupRollout.finished`).
    """

    def __init__(
        self,
        rollout: GroupRollout,
        reward: TrajectoryReward,
        *,
        seed: int,
        should_stop: Callable[[], bool] | None = None,
    ):
        self._rollout = rollout
        self._reward = reward
        self._seed = seed
        self._should_stop = should_stop
        self.first_finished_s: float | None = None
        """Age of this process in seconds when its first trajectory finished, or None if none has finished yet."""

    def play(self, prompts: Sequence[Prompt], *, version: int, counts: RolloutCounts) -> list[Trajectory]:
        """Play a group of trajectories for each prompt, and return all trajectories, by prompt and then by sample.

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the rollout was interrupted.
        """
        finished = self._score(self._rollout.play(prompts, seed=self._seed, version=version, counts=counts))
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

        Unfinished trajectories get no reward.

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the rollout was interrupted.
        """
        played, playing = self._rollout.play_on(
            groups, budgets=budgets, seed=self._seed, version=version, counts=counts
        )
        self._score(playing)
        return played

    def _score(self, playing: Playing) -> list[Trajectory]:
        trajectories = []
        for done in self._rollout.finished(playing, should_stop=self._should_stop):
            self._reward.score(done.trajectory, done.turn_texts, done.prompt.answers, done.context_logprobs)
            trajectories.append(done.trajectory)
            if self.first_finished_s is None:
                self.first_finished_s = process_age_s()
        return trajectories
