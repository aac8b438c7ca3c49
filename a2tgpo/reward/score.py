"""Compute a trajectory's outcome reward and the information gain of each of its process turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from a2tgpo.config.reward import RewardConfig
from a2tgpo.protocol.protocol import ResponseFormat
from a2tgpo.protocol.tag_format import TagFormat
from a2tgpo.reward.info_gain import answer_logprob, answer_probability, info_gains
from a2tgpo.reward.outcome import score_answer
from a2tgpo.reward.overlong import overlong_penalty
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class TrajectoryReward:
    """Compute the reward of a trajectory and the gains of its turns."""

    measure: str
    """Value of `rollout.gain.measure`."""
    format: ResponseFormat = field(default_factory=TagFormat)
    """Finds the answer in a response, and judges the response's format."""
    overlong: RewardConfig = field(default_factory=RewardConfig)
    """Settings of the penalty for long responses. The penalty does not change exact match or format."""
    max_response_tokens: int = 0
    """Value of `rollout.max_response_tokens`."""

    def score(
        self,
        trajectory: Trajectory,
        turn_texts: Sequence[str],
        answers: Sequence[str],
        context_logprobs: Sequence[list[list[float]] | None],
    ) -> None:
        """Set the fields of `trajectory` for its reward, exact match, format, answer probabilities and gains.

        Args:
            turn_texts: the policy's text of each turn.
            answers: the gold answer and its aliases.
            context_logprobs: the value of `Finished.context_logprobs`.
        """
        answer = self.format.answer_of(trajectory, turn_texts)
        format_ok = answer is not None and self.format.is_well_formed(trajectory, turn_texts)
        outcome = score_answer(answer, answers, format_ok=format_ok)
        trajectory.outcome_reward = outcome.reward + overlong_penalty(
            trajectory.num_tokens - len(trajectory.prompt_tokens),
            max_tokens=self.max_response_tokens,
            buffer_tokens=self.overlong.overlong_buffer_tokens,
            penalty=self.overlong.overlong_penalty,
        )
        trajectory.exact_match = outcome.exact_match
        trajectory.format_ok = outcome.format_ok
        if not context_logprobs:
            return
        logprobs = [None if aliases is None else answer_logprob(aliases) for aliases in context_logprobs]
        trajectory.baseline_prob = answer_probability(logprobs[0])
        gains = info_gains(logprobs, measure=self.measure)
        for turn, logprob, gain in zip(trajectory.process_turns, logprobs[1:], gains, strict=True):
            turn.answer_prob = answer_probability(logprob)
            turn.info_gain = gain
