"""Tokenise gold answers, and the scaffold in front of an answer, for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.config.rollout import GainConfig
from a2tgpo.config.run import SCORED_ANSWER_TOKENS
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.protocol import THINK_CLOSE, THINK_OPEN, thought_is_open
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerTokens:
    """Tokenise scaffold and answers separately, so that an answer has the same tokens in every context.

    Args:
        opening_tags: the tags at the end of every prompt (`PromptTemplate.opening_tags`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GainConfig, *, opening_tags: str = ""):
        self._tokenizer = tokenizer
        self._literal = LiteralEncoder(tokenizer)
        self._starts_in_thought = thought_is_open(opening_tags)
        self._num_aliases = 1 if config.answer_reduction == "first" else config.max_aliases
        outside = config.scaffold.removeprefix(THINK_CLOSE)
        inside = config.scaffold.removeprefix(THINK_OPEN)
        self._outside, self._inside = self._literal.encode_parts([outside, inside])

    def scaffold(self, trajectory: Trajectory, num_turns: int) -> list[int]:
        """Return the tokens between the gold answer and the context.

        The context is the prompt and the first `num_turns` turns. A <think> at the beginning of the scaffold is left
        out if a thought is open in the context, and a </think> is left out if no thought is open.
        """
        written = "".join(
            str(self._tokenizer.decode(turn.tokens.tolist(), skip_special_tokens=False))
            for turn in trajectory.turns[:num_turns]
        )
        return self._inside if thought_is_open(written, before=self._starts_in_thought) else self._outside

    def aliases(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the `answers` to score, without duplicates.

        An alias is left out if it may not fit after a response of full length, so that all contexts are scored
        with the same aliases. If no alias fits, the first one stays.
        """
        distinct = dict.fromkeys(
            tuple(self._literal.encode(answer)) for answer in answers[: self._num_aliases]
        )
        aliases = [list(tokens) for tokens in distinct if tokens]
        room = SCORED_ANSWER_TOKENS - max(len(self._outside), len(self._inside))
        return [alias for alias in aliases if len(alias) < room] or aliases[:1]
