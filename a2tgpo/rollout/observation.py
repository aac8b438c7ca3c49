"""Tool answers as tokens: cut by tokens, tokenised on their own, never together with what stands before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.rollout.tool_call import (
    RESULT_CLOSE,
    RESULT_OPEN,
    format_failure,
    format_observation,
    format_passage,
)
from a2tgpo.search.passage import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ObservationEncoder:
    """Turns passages into the tokens appended to a trajectory.

    Args:
        tokenizer: the policy's.
        max_passage_tokens: each passage, title included, is cut to this many tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_passage_tokens: int):
        self._tokenizer = tokenizer
        self._max_passage_tokens = max_passage_tokens
        self._opening = self._encode(RESULT_OPEN)
        self._closing = self._encode(RESULT_CLOSE)

    def text(self, passages: Sequence[Passage]) -> str:
        """The observation as text, each passage cut; what demonstrations should show."""
        formatted = [format_passage(rank, passage) for rank, passage in enumerate(passages, start=1)]
        return format_observation([self._cut(passage) for passage in formatted])

    def encode(self, passages: Sequence[Passage]) -> list[int]:
        return self._encode(self.text(passages))

    def encode_failure(self, reason: str) -> list[int]:
        return self._encode(format_failure(reason))

    @property
    def min_tokens(self) -> int:
        """Room that the tags alone take."""
        return len(self._opening) + len(self._closing)

    def fit(self, tokens: list[int], room: int) -> list[int]:
        """`tokens` of an observation in at most `room` >= `min_tokens`, still opened and closed by its tags."""
        if len(tokens) <= room:
            return tokens
        assert room >= self.min_tokens, f"{room} tokens do not hold the result's tags"
        return tokens[: room - len(self._closing)] + self._closing

    def _cut(self, text: str) -> str:
        tokens = self._encode(text)
        if len(tokens) <= self._max_passage_tokens:
            return text
        # A cut inside a multi-byte character decodes to replacement characters: drop them.
        return str(self._tokenizer.decode(tokens[: self._max_passage_tokens])).rstrip("\ufffd")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]
