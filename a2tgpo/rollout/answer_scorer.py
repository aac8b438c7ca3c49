"""Scoring of the gold answer in a context while that context is still in the engine's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.engine_output import ScoreOutput
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from a2tgpo.rollout.vllm_engine import VllmEngine


@dataclass(kw_only=True)
class AnswerScore:
    """Log-probs of each alias's tokens in one context, filled in as the engine returns them."""

    aliases: list[list[float] | None]
    """For each alias, nats per answer token; None until scored, and permanently if the alias did not fit."""

    num_pending: int = 0
    """Aliases that the engine is still scoring."""

    @property
    def logprobs(self) -> list[list[float]] | None:
        """Log-probs of all aliases; None unless all were scored (a maximum needs the same aliases in every turn)."""
        scored = [alias for alias in self.aliases if alias is not None]
        return scored if len(scored) == len(self.aliases) else None


class AnswerScorer:
    """Submit scorings to the engine and assign its outputs to contexts and aliases."""

    def __init__(self, engine: VllmEngine, answers: AnswerTokens, counts: RolloutCounts):
        self._engine = engine
        self._counts = counts
        self._answers = answers
        self._in_flight: dict[str, tuple[AnswerScore, int]] = {}
        self._num_submitted = 0

    def submit(self, trajectory: Trajectory, num_turns: int, aliases: Sequence[Sequence[int]]) -> AnswerScore:
        """Queue log p(alias | context, scaffold) for each alias; the returned score fills while the engine steps.

        The context is the prompt and the first `num_turns` turns, all of them process turns.
        """
        score = AnswerScore(aliases=[None] * len(aliases))
        context = trajectory.tokens[: trajectory.context_lengths[num_turns]]
        prefix = [*context, *self._answers.scaffold(trajectory, num_turns)]
        if not aliases or len(prefix) + max(map(len, aliases)) >= self._engine.max_model_len:
            return score if aliases else AnswerScore(aliases=[None])
        for index, alias in enumerate(aliases):
            request_id = f"score-{self._num_submitted}"
            self._num_submitted += 1
            self._in_flight[request_id] = (score, index)
            score.num_pending += 1
            self._engine.submit_score(request_id, prefix, alias)
        return score

    def collect(self, output: ScoreOutput) -> None:
        """Store a finished scoring's log-probs in its score."""
        score, index = self._in_flight.pop(output.request_id)
        score.aliases[index] = output.answer_logprobs
        score.num_pending -= 1
        self._counts.scored_tokens += len(output.answer_logprobs)
        self._counts.score_prompt_tokens += output.num_prompt_tokens
        self._counts.score_cached_tokens += output.num_cached_tokens
