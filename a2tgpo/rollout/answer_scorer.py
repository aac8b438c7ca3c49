"""Score the gold answer in a context while the engine's cache still holds that context."""

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
    """Log-probs of the tokens of each alias in one context."""

    aliases: list[list[float] | None]
    """For each alias, the log-prob of each token in nats, or None until the alias is scored. If one alias does not
    fit, all are None."""

    num_pending: int = 0
    """Number of aliases that the engine is still scoring."""

    @property
    def logprobs(self) -> list[list[float]] | None:
        """Log-probs of all aliases, or None if any alias lacks a score.

        A maximum over aliases is comparable between turns only if every turn has the same aliases.
        """
        scored = [alias for alias in self.aliases if alias is not None]
        return scored if len(scored) == len(self.aliases) else None


class AnswerScorer:
    """Send scoring requests to the engine, and store their outputs."""

    def __init__(self, engine: VllmEngine, answers: AnswerTokens, counts: RolloutCounts):
        self._engine = engine
        self._counts = counts
        self._answers = answers
        self._in_flight: dict[str, tuple[AnswerScore, int]] = {}
        self._num_submitted = 0

    def submit(self, trajectory: Trajectory, num_turns: int, aliases: Sequence[Sequence[int]]) -> AnswerScore:
        """Queue a request for log p(alias | context, scaffold) for each alias.

        The context is the prompt and the first `num_turns` turns, which must be process turns. `collect` fills in the
        returned score later.
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
        """Store the log-probs of a finished request in the score that `submit` returned."""
        score, index = self._in_flight.pop(output.request_id)
        score.aliases[index] = output.answer_logprobs
        score.num_pending -= 1
        self._counts.scored_tokens += len(output.answer_logprobs)
        self._counts.score_prompt_tokens += output.num_prompt_tokens
        self._counts.score_cached_tokens += output.num_cached_tokens
