"""Gold answers as the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.config.rollout import GainConfig
from a2tgpo.config.run import ANSWER_ROOM_TOKENS
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.protocol import THINK_CLOSE, THINK_OPEN, thought_is_open
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerTokens:
    """Tokenises scaffold and answers, each on its own: the scored span is the answer's, whatever stands before.

    Args:
        tokenizer: the policy's.
        config: the `rollout.gain` section.
        opening_tags: those that the prompt ends with (`PromptTemplate.opening_tags`).
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
        """What stands between the context behind the first `num_turns` turns (0: the prompt) and an answer.

        Where a thought is open it is continued or closed, and where none is open none is closed.
        """
        written = "".join(
            str(self._tokenizer.decode(turn.tokens.tolist(), skip_special_tokens=False))
            for turn in trajectory.turns[:num_turns]
        )
        return self._inside if thought_is_open(written, before=self._starts_in_thought) else self._outside

    def aliases(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of those of a question's `answers` that count, each once.

        An alias for which there may be no room behind a response of full length is left out, unless no other is left:
        the maximum must run over the same aliases in every context.
        """
        distinct = dict.fromkeys(
            tuple(self._literal.encode(answer)) for answer in answers[: self._num_aliases]
        )
        aliases = [list(tokens) for tokens in distinct if tokens]
        room = ANSWER_ROOM_TOKENS - max(len(self._outside), len(self._inside))
        return [alias for alias in aliases if len(alias) < room] or aliases[:1]
