"""Convert tools' answers to observation tokens, and cut the tokens to the available room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.protocol.part_cut import REPLACEMENT, PartCut
from a2tgpo.protocol.tag_syntax import RESULT_CLOSE, RESULT_OPEN, CallSyntax

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CHARACTER_TOKENS = 4
"""Largest number of tokens of one character, which has at most 4 bytes in UTF-8."""


class ObservationEncoder:
    """Encodes a tool's answer as the tokens of an observation.

    The observation contains the protocol's tags and no other control token.

    Args:
        syntax: the tags to write, and to remove from answers.
        max_part_tokens: number of tokens to which each part of an answer is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, syntax: CallSyntax, max_part_tokens: int):
        self._literal = LiteralEncoder(tokenizer)
        self._parts = PartCut(tokenizer, self._literal, max_tokens=max_part_tokens)
        self._syntax = syntax
        self._opening, self._closing = self._literal.encode_parts([RESULT_OPEN, RESULT_CLOSE])

    def encode(self, parts: Sequence[str]) -> list[int]:
        return self._encode_result(self._syntax.result_body([self._parts.cut(part) for part in parts]))

    def encode_failure(self, name: str, reason: str) -> list[int]:
        return self._encode_result(self._syntax.failure_body(name, reason))

    @property
    def min_tokens(self) -> int:
        """Number of tokens of the two tags together."""
        return len(self._opening) + len(self._closing)

    def fit(self, tokens: list[int], room: int) -> list[int]:
        """Cut an observation's `tokens` to at most `room`, but keep both tags. `room` is at least `min_tokens`."""
        if len(tokens) <= room:
            return tokens
        assert room >= self.min_tokens, f"{room} tokens are too few for the result's tags"
        kept = tokens[: room - len(self._closing)]
        whole = next((end for end in range(len(kept), 0, -1) if self._ends_a_character(kept[:end])), 0)
        return kept[:whole] + self._closing

    def _ends_a_character(self, tokens: list[int]) -> bool:
        """Return whether the last of `tokens` ends a character."""
        return not self._parts.decode(tokens[-MAX_CHARACTER_TOKENS:]).endswith(REPLACEMENT)

    def _encode_result(self, body: str) -> list[int]:
        return self._literal.encode_between(RESULT_OPEN, body, RESULT_CLOSE)
