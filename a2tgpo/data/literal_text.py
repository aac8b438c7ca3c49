r"""Encode text written by others, so that the spelling of a control token stays text.

A tokenizer replaces the spelling of a control token, such as <|im_end|> or <tool_call>, anywhere in a text. A passage
about chat templates would then end the policy's turn, and a question could open a system message. transformers'
`split_special_tokens` covers only tokens marked as special; several families add <think> or <|fim_prefix|> without
that mark. This module therefore breaks up such spellings and encodes the parts separately. Text without such a
spelling gets the same tokens as from the tokenizer itself.

SentencePiece tokenizers (of Llama 2, for example) put a space before every text, which only the beginning of a
sequence should have: `\boxed{` and `Vienna`, encoded separately, would become `\boxed{ Vienna`. This module removes
the additional space from all parts but the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""Marks where a spelling is broken up: a Unicode noncharacter, which is removed from input text."""

_TAG = re.compile(r"\s*(<.+>|\[.+\])\s*", re.DOTALL)
_SPACE = "\u2581"
"""SentencePiece's character for a space."""
_ANCHOR = "\n"
"""Anchor before a part: it takes the leading space of such a tokenizer, and seldom merges with the following text."""


class LiteralEncoder:
    """Encodes text written by others within a frame written by this program.

    Args:
        tokenizer: the policy's. Control tokens are the tokens added to its vocabulary that are marked as special or
            look like a tag, such as <think> or [INST]. Other additions are words of a domain or runs of spaces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = {
            number: str(token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if (token.special or _TAG.fullmatch(str(token)))
            and number != tokenizer.unk_token_id
            and len(str(token)) > 1  # a single character cannot be broken up
        }
        self._control_ids = frozenset(added)
        spellings = "|".join(map(re.escape, added.values()))
        # Matched at every character, because one spelling may begin inside another.
        self._spelling = re.compile(rf"(?=(?:{spellings}))(.)", re.DOTALL) if added else None
        self._anchor = self._ids([_ANCHOR])[0] if self._puts_a_space_first() else None

    def broken_up(self, text: str) -> str:
        """Insert a `BREAK` into every spelling of a control token, and replace lone surrogates."""
        text = text.replace(BREAK, "").encode("utf-8", "replace").decode("utf-8")
        return text if self._spelling is None else self._spelling.sub(rf"\1{BREAK}", text)

    def encode(self, text: str) -> list[int]:
        """Encode text by others."""
        return self.encode_between("", text, "")

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        """Encode `before` + `text` + `after`, where only `text` is by others."""
        return self.encode_framed([text], lambda inner: [f"{before}{one}{after}" for one in inner])[0]

    def encode_framed(
        self,
        texts: Sequence[str],
        frame: Callable[[Sequence[str]], list[str]],
        *,
        begins_sequence: bool = False,
    ) -> list[list[int]]:
        """Encode `frame(texts)`, which puts each of `texts` into text of our own.

        Each result holds the control tokens of the frame and no others.

        Args:
            begins_sequence: nothing precedes the results, so their beginning is encoded like the tokenizer's own.
        """

        def encode(framed: list[str]) -> list[list[int]]:
            return self.encode_parts(framed, begins_sequence=begins_sequence)

        encoded = encode(frame([self.broken_up(text) for text in texts]))
        (of_frame,) = map(self._control_tokens, encode(frame(["?"])))
        for place, text in enumerate(texts):
            # A tokenizer that normalises text may find a spelling that was not there before.
            if self._control_tokens(encoded[place]) != of_frame:
                (encoded[place],) = encode(frame([BREAK.join(self.broken_up(text))]))
        return encoded

    def encode_tagged(self, text: str, tags: re.Pattern[str]) -> list[int]:
        """Encode text whose `tags` are real, while no other part may become a control token."""
        pieces, position = [], 0
        for tag in tags.finditer(text):
            pieces += [self.broken_up(text[position : tag.start()]), tag[0]]
            position = tag.end()
        return self.encode_parts(["".join([*pieces, self.broken_up(text[position:])])])[0]

    def encode_parts(self, texts: Sequence[str], *, begins_sequence: bool = False) -> list[list[int]]:
        """Encode each text, with the parts between `BREAK`s encoded separately.

        Args:
            begins_sequence: as for `encode_framed`.
        """
        parts = [text.split(BREAK) for text in texts]
        inside = iter(self._encode_inside([part for of_text in parts for part in of_text]))
        encoded = [[next(inside) for _ in of_text] for of_text in parts]
        if begins_sequence and self._anchor is not None:
            for pieces, begin in zip(encoded, self._ids([of_text[0] for of_text in parts]), strict=True):
                pieces[0] = begin
        return [[token for piece in pieces for token in piece] for pieces in encoded]

    def _encode_inside(self, parts: Sequence[str]) -> list[list[int]]:
        """Encode parts that follow other tokens."""
        if self._anchor is None:
            return self._ids(parts)
        width = len(self._anchor)
        return [
            # A part that merges with the anchor keeps its space.
            anchored[width:] if anchored[:width] == self._anchor else plain
            for plain, anchored in zip(
                self._ids(parts), self._ids([_ANCHOR + part for part in parts]), strict=True
            )
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Call the tokenizer without begin- and end-of-sequence tokens."""
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _puts_a_space_first(self) -> bool:
        first = self._tokenizer.convert_ids_to_tokens(self._ids(["x"])[0])[:1]
        return bool(first) and str(first[0]).startswith(_SPACE)

    def _control_tokens(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]
