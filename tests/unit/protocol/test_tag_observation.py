"""Observations are cut to a number of tokens. Here each byte of a character is a token."""

import pytest
from tiny_models import build_tokenizer

from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.protocol.part_cut import MAX_TOKEN_CHARS, PartCut
from a2tgpo.protocol.tag_observation import ObservationEncoder
from a2tgpo.protocol.tag_syntax import SEARCH_CALLS

TEXTS = ["東京は日本の首都です", "กรุงเทพมหานคร", "😀😃😄😁", "naïve café ça", "a b ."]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encoder(tokenizer, *, max_part_tokens):
    return ObservationEncoder(tokenizer, syntax=SEARCH_CALLS, max_part_tokens=max_part_tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_a_part_is_cut_between_characters_as_late_as_its_tokens_allow(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    for limit in range(1, len(tokens) + 1):
        shown = tokenizer.decode(encoder(tokenizer, max_part_tokens=limit).encode([text]))
        body = shown.removeprefix(" <result>\n").removesuffix("\n</result>")
        whole = [end for end in range(limit + 1) if text.startswith(tokenizer.decode(tokens[:end]))]
        assert body == tokenizer.decode(tokens[: max(whole)])
    assert body == text


@pytest.mark.parametrize("text", TEXTS)
def test_an_observation_is_fitted_into_its_room_without_half_a_character(tokenizer, text):
    observations = encoder(tokenizer, max_part_tokens=400)
    tokens = observations.encode([text])
    for room in range(observations.min_tokens, len(tokens) + 1):
        fitted = observations.fit(tokens, room)
        shown = tokenizer.decode(fitted)
        assert room - 3 <= len(fitted) <= room and "\ufffd" not in shown
        assert shown.startswith(" <result>\n") and shown.endswith("\n</result>")
        assert text.startswith(shown.removeprefix(" <result>\n").removesuffix("\n</result>"))


def test_only_the_beginning_of_a_huge_part_is_read(tokenizer):
    class Recording(LiteralEncoder):
        longest = 0

        def encode(self, text):
            self.longest = max(self.longest, len(text))
            return super().encode(text)

    literal = Recording(tokenizer)
    part = PartCut(tokenizer, literal, max_tokens=50).cut("word " * 100_000)
    assert literal.longest == 50 * MAX_TOKEN_CHARS
    assert len(literal.encode(part)) == 50 and ("word " * 50).startswith(part)
