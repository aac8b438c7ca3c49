"""Text that others wrote, as tokens: what spells a control token stays text.

A tokenizer turns the spelling of a control token, such as <|im_end|> or <tool_call>, into that token wherever it
stands. A passage about chat templates would then end the policy's turn, and a question could open a system message.
transformers' `split_special_tokens` covers only tokens that are marked as special; several families add <think> or
<|fim_prefix|> without that mark. Therefore spellings are broken up here and their parts encoded one by one. Text
without such a spelling gets the same tokens as from the tokenizer itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""Where a spelling is broken up: a Unicode noncharacter, which is removed from text that holds it."""

_TAG = re.compile(r"\s*(<.+>|\[.+\])\s*", re.DOTALL)


class LiteralEncoder:
    """Encodes text that others wrote inside a frame of our own.

    Args:
        tokenizer: the policy's. Control tokens are those added to its vocabulary that are marked as special or look
            like a tag, such as <think> or [INST]. Other additions are words of a domain or runs of spaces.
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
        # Looked for at every character: one spelling may begin inside another.
        self._spelling = re.compile(rf"(?=(?:{spellings}))(.)", re.DOTALL) if added else None

    def broken_up(self, text: str) -> str:
        """`text` with a `BREAK` inside every spelling of a control token, and without lone surrogates."""
        text = text.replace(BREAK, "").encode("utf-8", "replace").decode("utf-8")
        return text if self._spelling is None else self._spelling.sub(rf"\1{BREAK}", text)

    def encode(self, text: str) -> list[int]:
        """Token ids of text that others wrote."""
        return self.encode_between("", text, "")

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        """Token ids of `before` + `text` + `after`, of which others wrote `text`."""
        return self.encode_framed([text], lambda inner: [f"{before}{one}{after}" for one in inner])[0]

    def encode_framed(
        self, texts: Sequence[str], frame: Callable[[Sequence[str]], list[str]]
    ) -> list[list[int]]:
        """Token ids of `frame(texts)`, which puts each of `texts` into text of our own.

        Each result holds the control tokens of the frame and no others.
        """
        encoded = self.encode_parts(frame([self.broken_up(text) for text in texts]))
        (of_frame,) = map(self._control_tokens, self.encode_parts(frame(["?"])))
        for place, text in enumerate(texts):
            # A tokenizer that normalises what it reads may find a spelling where there was none.
            if self._control_tokens(encoded[place]) != of_frame:
                (encoded[place],) = self.encode_parts(frame([BREAK.join(self.broken_up(text))]))
        return encoded

    def encode_tagged(self, text: str, tags: re.Pattern[str]) -> list[int]:
        """Token ids of text whose `tags` are meant as such, while nothing else in it is a control token."""
        pieces, position = [], 0
        for tag in tags.finditer(text):
            pieces += [self.broken_up(text[position : tag.start()]), tag[0]]
            position = tag.end()
        return self.encode_parts(["".join([*pieces, self.broken_up(text[position:])])])[0]

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, whose parts between `BREAK`s are encoded one by one."""
        parts = [text.split(BREAK) for text in texts]
        flat = [part for of_text in parts for part in of_text]
        ids = iter(self._tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else ())
        return [[token for _ in of_text for token in next(ids)] for of_text in parts]

    def _control_tokens(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]
