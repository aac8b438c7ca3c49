"""Does the trainer find the answers as probable as the engine did?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from a2tgpo.batch.probes import Probe, ProbedSequence
from a2tgpo.config.rollout import GainConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy
from a2tgpo.reward.info_gain import answer_logprob
from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.probe_scores import score_probes


class GainCheck:
    """Scores a sample of a step's contexts again, by the weights that played them.

    Args:
        policy: of this rank.
        config: how often, and how many trajectories of each replica.
        answer_tokens: those of the engine's scorer.
        answers: gold answers by question id.
        max_tokens: positions of one row of the model.
    """

    def __init__(
        self,
        policy: Policy,
        config: GainConfig,
        *,
        answer_tokens: AnswerTokens,
        answers: Mapping[str, Sequence[str]],
        max_tokens: int,
    ):
        self._policy = policy
        self._config = config
        self._tokens = answer_tokens
        self._answers = answers
        self._max_tokens = max_tokens

    def run(self, step: int, trajectories: Sequence[Trajectory], metrics: MetricSums) -> None:
        """In steps whose turn it is, add how far engine and trainer are apart; every rank must call this.

        `gain/engine_trainer_gap` is the mean over contexts of |log P by the engine - log P by the trainer|, where
        log P is the best alias's mean log-prob of a token, nats; `gain/engine_trainer_gap_max` is the largest. Left
        out of a step without a context that the engine scored.

        Args:
            step: of the run, from 0.
            trajectories: this replica's share of the step, not yet trained on.
            metrics: to be reduced over the data-parallel group.
        """
        every = self._config.verify_every
        if every == 0 or step % every:
            return
        # One that was finished in an earlier step was scored by weights that are no longer there.
        current = [trajectory for trajectory in trajectories if trajectory.turns[-1].step == step]
        sample = _spread(current, self._config.verify_trajectories)
        sequences = [self._probed(trajectory) for trajectory in sample]
        scores = score_probes(self._policy, sequences, max_tokens=self._max_tokens)
        gaps = [
            abs(math.log(engine) - trainer)
            for trajectory, found in zip(sample, scores, strict=True)
            for engine, trainer in zip(
                trajectory.context_probs, self._by_context(trajectory, found), strict=True
            )
            if engine and trainer is not None
        ]
        if gaps:
            metrics.add("gain/engine_trainer_gap", math.fsum(gaps), len(gaps))
            metrics.add_max("gain/engine_trainer_gap_max", max(gaps))

    def _probed(self, trajectory: Trajectory) -> ProbedSequence:
        aliases = self._aliases(trajectory)
        probes = [
            Probe(
                prefix_length=length,
                scaffold=tuple(self._tokens.scaffold(trajectory, num_turns)),
                answer=tuple(alias),
            )
            for num_turns, length in enumerate(trajectory.context_lengths)
            for alias in aliases
        ]
        return ProbedSequence(tokens=trajectory.tokens, probes=probes)

    def _by_context(self, trajectory: Trajectory, scores: list[list[float]]) -> list[float | None]:
        """The best alias's mean log-prob in each context."""
        count = len(self._aliases(trajectory))
        contexts = range(len(trajectory.context_lengths))
        return [answer_logprob(scores[context * count : (context + 1) * count]) for context in contexts]

    def _aliases(self, trajectory: Trajectory) -> list[list[int]]:
        return self._tokens.aliases(self._answers[trajectory.prompt_id])


def _spread(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """At most `count`, evenly over the list: of as many groups as there are."""
    count = min(count, len(trajectories))
    return [trajectories[number * len(trajectories) // count] for number in range(count)]
