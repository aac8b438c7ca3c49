"""The tokens of gold answers, as scored."""

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
    """Tokenise scaffold and answers separately, so that the scored tokens do not depend on the text before them.

    Args:
        tokenizer: the policy's.
        config: the `rollout.gain` section.
        opening_tags: the tags that end the prompt (`PromptTemplate.opening_tags`).
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
        """Return the tokens between the context after `num_turns` turns (0: the prompt) and the gold answer.

        The scaffold fits the context: it closes a thought only where one is open, and opens one only where none is.
        """
        written = "".join(
            str(self._tokenizer.decode(turn.tokens.tolist(), skip_special_tokens=False))
            for turn in trajectory.turns[:num_turns]
        )
        return self._inside if thought_is_open(written, before=self._starts_in_thought) else self._outside

    def aliases(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the `answers` to score, without duplicates.

        An alias that may not fit after a response of full length is left out, unless no other remains: the maximum
        must run over the same aliases in every context.
        """
        distinct = dict.fromkeys(
            tuple(self._literal.encode(answer)) for answer in answers[: self._num_aliases]
        )
        aliases = [list(tokens) for tokens in distinct if tokens]
        room = SCORED_ANSWER_TOKENS - max(len(self._outside), len(self._inside))
        return [alias for alias in aliases if len(alias) < room] or aliases[:1]
