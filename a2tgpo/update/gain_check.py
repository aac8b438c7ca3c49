"""Compare the trainer's probabilities of the gold answers with those of the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from a2tgpo.config.rollout import GainConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy
from a2tgpo.reward.info_gain import answer_logprob
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.context_scores import ContextScorer


class GainCheck:
    """Rescore some contexts of a step with the trainer, using the weights that played the step."""

    def __init__(self, policy: Policy, config: GainConfig, scorer: ContextScorer):
        self._policy = policy
        self._config = config
        self._scorer = scorer

    def run(self, version: int, trajectories: Sequence[Trajectory]) -> MetricSums:
        """Return metrics of the gap between the engine's and the trainer's log-probs. Every rank must call this.

        A check runs only if `version` is a multiple of `verify_every`. For each context, log P is the best alias's
        mean log-prob per token, in nats. The gap of a context is |log P by the engine - log P by the trainer|.
        `gain/engine_trainer_gap` is the mean gap, and `gain/engine_trainer_gap_max` is the largest gap. The metrics
        must be reduced over the data-parallel group. They are omitted if no gap was measured.

        Args:
            version: the version of the policy's weights (`Turn.version`).
            trajectories: this data-parallel replica's share of the step's trajectories, before the policy is trained
                on them.
        """
        every, metrics = self._config.verify_every, MetricSums()
        if every == 0 or version % every:
            return metrics
        # Leave out trajectories that ended in an earlier step, because the weights that scored them no longer exist.
        current = [trajectory for trajectory in trajectories if trajectory.turns[-1].version == version]
        sample = _spread(current, self._config.verify_trajectories)
        gaps = [
            abs(math.log(engine) - trainer)
            for trajectory, contexts in zip(sample, self._scorer.score(self._policy, sample), strict=True)
            for engine, aliases in zip(trajectory.context_probs, contexts, strict=True)
            if engine and aliases is not None and (trainer := answer_logprob(aliases)) is not None
        ]
        if gaps:
            metrics.add("gain/engine_trainer_gap", math.fsum(gaps), len(gaps))
            metrics.add_max("gain/engine_trainer_gap_max", max(gaps))
        return metrics


def _spread(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Select at most `count` trajectories at equal distances in the list, to cover as many groups as possible."""
    count = min(count, len(trajectories))
    return [trajectories[number * len(trajectories) // count] for number in range(count)]
