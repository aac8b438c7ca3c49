"""Set a trajectory's gains, exact match and reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from a2tgpo.config.reward import RewardConfig
from a2tgpo.reward.answer_match import exact_match
from a2tgpo.reward.episode import Episode, EpisodeReader
from a2tgpo.reward.info_gain import set_gains
from a2tgpo.reward.overlong import overlong_penalty
from a2tgpo.reward.total import Verdict
from a2tgpo.trajectory import Prompt, Trajectory


@dataclass(frozen=True, kw_only=True)
class TrajectoryReward:
    """Scores trajectories. Call `begin` when a trajectory has ended, and `finish` when its episode is judged."""

    reader: EpisodeReader
    measure: str = "probability"
    """Value of `rollout.gain.measure`."""
    config: RewardConfig = field(default_factory=RewardConfig)
    """The section `reward`."""
    max_response_tokens: int = 0
    """Value of `rollout.max_response_tokens`."""

    def begin(
        self,
        trajectory: Trajectory,
        prompt: Prompt,
        turn_texts: Sequence[str],
        context_logprobs: Sequence[list[list[float]] | None],
    ) -> Episode:
        """Set exact match, format, answer probabilities and gains, and return the episode for the rewards.

        Args:
            turn_texts: the policy's text of each turn.
            context_logprobs: the value of `Finished.context_logprobs`.
        """
        episode = self.reader.read(trajectory, prompt, turn_texts)
        has_answer = episode.answer is not None
        trajectory.exact_match = exact_match(episode.answer or "", episode.answers) if has_answer else 0.0
        trajectory.format_ok = episode.format_ok
        if context_logprobs:
            set_gains(trajectory, context_logprobs, measure=self.measure)
        return episode

    def finish(self, trajectory: Trajectory, verdict: Verdict) -> None:
        """Set the reward of `trajectory`, or the reason why it has none."""
        trajectory.reward_error = verdict.error
        if verdict.error is not None:
            return
        trajectory.rewards = verdict.rewards
        trajectory.task_reward = verdict.total
        trajectory.outcome_reward = verdict.total + overlong_penalty(
            trajectory.num_tokens - len(trajectory.prompt_tokens),
            max_tokens=self.max_response_tokens,
            buffer_tokens=self.config.overlong_buffer_tokens,
            penalty=self.config.overlong_penalty,
        )
        if verdict.turn_scores is not None:
            for turn, score in zip(trajectory.process_turns, verdict.turn_scores, strict=True):
                turn.score = score if score is not None else turn.score  # keep a tool's score
