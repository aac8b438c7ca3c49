"""Split a text in any script into words, for BM25."""

from __future__ import annotations

import itertools
import re
import unicodedata

import regex

SPLITTING = 2
"""Version of the rules in `words_of`. Every index stores the version with which it was built."""

_ASCII_WORD = re.compile(r"\w+")
# A word includes the marks on its letters, because vowels are marks in Devanagari, Thai and many other scripts.
_WORD = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*")
# A letter with its marks, in a script without spaces between words, or with particles attached to words (Hangul).
# U+30FC lengthens a kana, but Unicode assigns it to no script.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
_UNSPACED_LETTER = regex.compile(_UNSPACED)
_RUN = regex.compile(rf"(?:{_UNSPACED})+|(?:(?!{_UNSPACED}).)+")
_ZERO_WIDTH_JOINER = "\u200d"
# Canonical combining classes of marks that change spelling: nuktas, viramas, kana voicing, signs of Telugu, Thai, Lao
# and Tibetan. All other marks are accents and points, which writers may omit.
_SPELLING = frozenset({0, 7, 8, 9, 84, 91, 103, 107, 118, 122, 129, 130, 132})


def words_of(text: str) -> list[str]:
    """Return the words of `text` in order, in lower case and without accents.

    In a script without spaces, a run of letters becomes overlapping pairs of letters, as in Lucene's CJKAnalyzer. A
    run of one letter becomes a word.
    """
    folded = text.casefold()
    if folded.isascii():  # twice as fast as the loop below; most passages are ASCII
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
    """Return `text` in NFKC form without accents such as that of "é". Marks that change the spelling, as in "パ",
    stay.
    """
    taken_apart = unicodedata.normalize("NFKD", text)
    kept = (c for c in taken_apart if unicodedata.combining(c) in _SPELLING and c != _ZERO_WIDTH_JOINER)
    return unicodedata.normalize("NFC", "".join(kept))
