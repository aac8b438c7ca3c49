"""The words of a text in any script, as BM25 counts them."""

from __future__ import annotations

import itertools
import re
import unicodedata

import regex

SPLITTING = 2
"""Version of what `words_of` does; an index remembers the one that it was built with."""

_ASCII_WORD = re.compile(r"\w+")
# Marks belong to their letters: in Devanagari, Thai and many other scripts they are vowels.
_WORD = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*")
# A letter with its marks, of a script that has no spaces between words, or writes particles right behind them
# (Hangul). U+30FC lengthens a kana; Unicode assigns it to no script.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
_UNSPACED_LETTER = regex.compile(_UNSPACED)
_RUN = regex.compile(rf"(?:{_UNSPACED})+|(?:(?!{_UNSPACED}).)+")
_ZERO_WIDTH_JOINER = "\u200d"
# Canonical combining classes of marks that spell: nuktas, viramas, kana voicing, signs of Telugu, Thai, Lao and
# Tibetan. The other classes are accents and points, which may be left out in writing.
_SPELLING = frozenset({0, 7, 8, 9, 84, 91, 103, 107, 118, 122, 129, 130, 132})


def words_of(text: str) -> list[str]:
    """The words of `text` in their order, without case and accents.

    Text of scripts without spaces between words comes as overlapping pairs of letters, as in Lucene's CJKAnalyzer, so
    that a query finds what is a part of a longer run of letters; a run of one letter is a word.
    """
    folded = text.casefold()
    if folded.isascii():  # most passages are: going through their characters would double the time
        return _ASCII_WORD.findall(folded)
    words: list[str] = []
    for word in _WORD.findall(_without_accents(folded)):
        if _UNSPACED_LETTER.search(word) is None:
            words.append(word)
            continue
        for run in _RUN.findall(word):
            letters = _UNSPACED_LETTER.findall(run)
            pairs = [first + second for first, second in itertools.pairwise(letters)]
            words += pairs or [run]
    return words


def _without_accents(text: str) -> str:
    """`text` in compatibility forms, composed again without its accents: "é" is "e", but Japanese "パ" stays."""
    taken_apart = unicodedata.normalize("NFKD", text)
    kept = (c for c in taken_apart if unicodedata.combining(c) in _SPELLING and c != _ZERO_WIDTH_JOINER)
    return unicodedata.normalize("NFC", "".join(kept))
