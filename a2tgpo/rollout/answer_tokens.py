"""Tokenise gold answers for scoring, and the scaffold that precedes an answer."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.config.rollout import GainConfig
from a2tgpo.config.run import SCORED_ANSWER_TOKENS
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.trajectory import Trajectory


class AnswerTokens:
    """Tokenise scaffold and answers separately, so that an answer has the same tokens in every context."""

    def __init__(self, protocol: AgentProtocol, config: GainConfig):
        self._protocol = protocol
        self._literal = LiteralEncoder(protocol.tokenizer)
        self._num_aliases = 1 if config.answer_reduction == "first" else config.max_aliases

    def scaffold(self, trajectory: Trajectory, num_turns: int) -> list[int]:
        """Return the tokens between a context (the prompt and `num_turns` turns) and the gold answer."""
        return self._protocol.scaffold(trajectory, num_turns)

    def aliases(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the `answers` to score, without duplicates.

        An alias that might not fit after a response of full length is left out in all contexts. All contexts are thus
        scored with the same aliases. If no alias fits, the first one is kept.
        """
        distinct = dict.fromkeys(
            tuple(self._literal.encode(answer)) for answer in answers[: self._num_aliases]
        )
        aliases = [list(tokens) for tokens in distinct if tokens]
        room = SCORED_ANSWER_TOKENS - self._protocol.max_scaffold_tokens
        return [alias for alias in aliases if len(alias) < room] or aliases[:1]
