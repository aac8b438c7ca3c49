"""Compute a trajectory's outcome reward and the information gain of each of its process turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from a2tgpo.config.reward import RewardConfig
from a2tgpo.reward.info_gain import answer_logprob, answer_probability, info_gains
from a2tgpo.reward.outcome import SEARCH_ONLY, judged_text, score_response
from a2tgpo.reward.overlong import overlong_penalty
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class TrajectoryReward:
    """Compute the reward of a trajectory and the gains of its turns."""

    measure: str
    """Value of `rollout.gain.measure`."""
    tools: tuple[str, ...] = SEARCH_ONLY
    """Names of the tools that the policy may call."""
    opening_tags: str | None = None
    """The think tags at the end of the prompt (`PromptTemplate.opening_tags`), or None if they are unknown."""
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
        answered = [turn.query is not None for turn in trajectory.turns]
        response = judged_text(list(zip(turn_texts, answered, strict=True)), opening_tags=self.opening_tags)
        outcome = score_response(response, answers, tools=self.tools)
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
