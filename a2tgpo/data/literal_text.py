r"""Encode text that this program did not write, so that no part of the text becomes a control token.

If a text contains the spelling of a control token, such as <|im_end|> or <tool_call>, a tokenizer encodes the
spelling as that token. A passage about chat templates could then end the policy's turn. transformers' option
`split_special_tokens` covers only tokens that are marked as special, and several model families do not mark <think>
or <|fim_prefix|>. This module therefore breaks up such spellings and encodes the parts separately.

A SentencePiece tokenizer (of Llama 2, for example) puts a space before every text that it encodes. If `\boxed{` and
`Vienna` were encoded separately, they would become `\boxed{ Vienna`. This module removes the space from every part
that does not begin a sequence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""A Unicode noncharacter that marks where a spelling is broken up. It is removed from all input text."""

_TAG = re.compile(r"\s*(<.+>|\[.+\])\s*", re.DOTALL)
_SPACE = "\u2581"
"""SentencePiece's character for a space."""
_ANCHOR = "\n"
"""Text that is put before a part, so that a SentencePiece tokenizer adds its space to this text, not to the part."""

NUM_FRAMES = 64
"""Number of frames whose control tokens are cached. Only a few different frames are common."""


class LiteralEncoder:
    """Encode text that this program did not write, inside text that it did write (the frame).

    Args:
        tokenizer: the policy's tokenizer. A token that was added to its vocabulary is a control token if it is marked
            as special or looks like a tag, such as <think> or [INST].
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
        # The pattern is tried at every character, because one spelling may begin inside another.
        self._spelling = re.compile(rf"(?=(?:{spellings}))(.)", re.DOTALL) if added else None
        self._anchor = self._ids([_ANCHOR])[0] if self._puts_a_space_first() else None
        self._tokens_of_frame = functools.lru_cache(maxsize=NUM_FRAMES)(self._find_tokens_of_frame)

    def broken_up(self, text: str) -> str:
        """Return `text` with a `BREAK` in every spelling of a control token, and with lone surrogates replaced."""
        text = text.replace(BREAK, "").encode("utf-8", "replace").decode("utf-8")
        return text if self._spelling is None else self._spelling.sub(rf"\1{BREAK}", text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, none of them a control token."""
        return self.encode_between("", text, "")

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        """Return the token ids of `before` + `text` + `after`. No part of `text` becomes a control token."""
        return self.encode_framed([text], lambda inner: [f"{before}{one}{after}" for one in inner])[0]

    def encode_framed(
        self,
        texts: Sequence[str],
        frame: Callable[[Sequence[str]], list[str]],
        *,
        begins_sequence: bool = False,
    ) -> list[list[int]]:
        """Return the token ids of each text in `frame(texts)`. Only the frame can contribute control tokens.

        Args:
            frame: a function that puts the frame around each text.
            begins_sequence: whether each result begins a sequence. If so, SentencePiece's space before it is kept.
        """

        def encode(framed: list[str]) -> list[list[int]]:
            return self.encode_parts(framed, begins_sequence=begins_sequence)

        encoded = encode(frame([self.broken_up(text) for text in texts]))
        of_frame = self._tokens_of_frame(frame(["?"])[0], begins_sequence)
        for place, text in enumerate(texts):
            # A tokenizer that normalises text may create a new spelling of a control token. If so, split the text
            # at every character.
            if self._control_tokens(encoded[place]) != of_frame:
                (encoded[place],) = encode(frame([BREAK.join(self.broken_up(text))]))
        return encoded

    def encode_joined(self, texts: Sequence[str], frame: Callable[[Sequence[str]], str]) -> list[int]:
        """Return the token ids of `frame(texts)`, which puts all texts into one frame.

        Only the frame can contribute control tokens.
        """
        (encoded,) = self.encode_parts([frame([self.broken_up(text) for text in texts])])
        (of_frame,) = self.encode_parts([frame(["?"] * len(texts))])
        if self._control_tokens(encoded) != self._control_tokens(of_frame):  # see `encode_framed`
            (encoded,) = self.encode_parts([frame([BREAK.join(self.broken_up(text)) for text in texts])])
        return encoded

    def encode_tagged(self, text: str, tags: re.Pattern[str]) -> list[int]:
        """Return the token ids of `text`. Only the tags that match `tags` can become control tokens."""
        pieces, position = [], 0
        for tag in tags.finditer(text):
            pieces += [self.broken_up(text[position : tag.start()]), tag[0]]
            position = tag.end()
        return self.encode_parts(["".join([*pieces, self.broken_up(text[position:])])])[0]

    def encode_parts(self, texts: Sequence[str], *, begins_sequence: bool = False) -> list[list[int]]:
        """Return the token ids of each text, with the parts between its `BREAK`s encoded separately."""
        parts = [text.split(BREAK) for text in texts]
        inside = iter(self._encode_inside([part for of_text in parts for part in of_text]))
        encoded = [[next(inside) for _ in of_text] for of_text in parts]
        if begins_sequence and self._anchor is not None:
            for pieces, begin in zip(encoded, self._ids([of_text[0] for of_text in parts]), strict=True):
                pieces[0] = begin
        return [[token for piece in pieces for token in piece] for pieces in encoded]

    def _encode_inside(self, parts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each part, without the space that a SentencePiece tokenizer puts before a text."""
        if self._anchor is None:
            return self._ids(parts)
        width = len(self._anchor)
        return [
            # If the tokenizer merges the part with the anchor, use the encoding that has the space.
            anchored[width:] if anchored[:width] == self._anchor else plain
            for plain, anchored in zip(
                self._ids(parts), self._ids([_ANCHOR + part for part in parts]), strict=True
            )
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokenizer's ids of each text, without begin- and end-of-sequence tokens."""
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _puts_a_space_first(self) -> bool:
        first = self._tokenizer.convert_ids_to_tokens(self._ids(["x"])[0])[:1]
        return bool(first) and str(first[0]).startswith(_SPACE)

    def _find_tokens_of_frame(self, framed: str, begins_sequence: bool) -> list[int]:
        """Return the control tokens of a frame around a text without control tokens."""
        return self._control_tokens(self.encode_parts([framed], begins_sequence=begins_sequence)[0])

    def _control_tokens(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]
