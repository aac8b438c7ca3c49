"""Cut a part of a tool's answer to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.data.literal_text import LiteralEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""The character that a decoder writes in place of invalid bytes."""


MAX_TOKEN_CHARS = 64
"""To cut a text to n tokens, only its first n * MAX_TOKEN_CHARS characters are tokenised. This bounds the time."""


class PartCut:
    """Cuts texts that are too long, but never inside a character.

    Args:
        max_tokens: number of tokens to which a text is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, literal: LiteralEncoder, *, max_tokens: int):
        self._tokenizer = tokenizer
        self._literal = literal
        self._max_tokens = max_tokens

    def cut(self, text: str) -> str:
        text = text[: self._max_tokens * MAX_TOKEN_CHARS]
        tokens = self._literal.encode(text)
        if len(tokens) <= self._max_tokens:
            return text
        # A cut inside a character leaves tokens that decode to replacement characters.
        return self.decode(tokens[: self._max_tokens]).rstrip(REPLACEMENT)

    def decode(self, tokens: Sequence[int]) -> str:
        # Keep spaces before punctuation, which some tokenizers would remove.
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
