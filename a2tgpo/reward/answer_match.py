"""Exact match and token F1 between an answer and its golds, after SQuAD normalisation (Eq. 14).

SQuAD's rules cover ASCII punctuation and words between spaces. Text with letters of another script than Latin is
therefore converted to Unicode's compatibility form (full-width digits and letters become plain) and stripped of all
punctuation; for F1, each character of a script without spaces is a word. Text in Latin letters follows SQuAD's rules
alone, so that scores compare with published ones. In any text, a letter and its accent are one character, and
invisible characters are ignored. (Some tokenizers compose their input, so their policies could not write a gold
answer that is not composed.)
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han."""
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def normalize_answer(text: str) -> str:
    """Normalise to lower case, without punctuation and articles, single spaces; empty only for a blank `text`.

    A text that would vanish, such as "A" or "The The", stays as written and equals only the same text.
    """
    return _normalized(text) or " ".join(text.split())


def is_kept_as_written(text: str) -> bool:
    """Return whether normalisation would leave nothing of `text`, so that it is compared as written."""
    return not _normalized(text)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the normalised answer equals any normalised gold answer, else 0.0; 0.0 for an empty answer."""
    normalized = normalize_answer(answer)
    return float(bool(normalized) and any(normalized == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: Sequence[str]) -> float:
    """Return the best token F1 over the gold answers; yes, no and noanswer match only as a whole."""
    return max((_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golds), default=0.0)


def _f1(answer: str, gold: str) -> float:
    closed = ("yes", "no", "noanswer")
    if answer != gold and (answer in closed or gold in closed):
        return 0.0
    answer_tokens, gold_tokens = _WORDS.findall(answer), _WORDS.findall(gold)
    num_same = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(answer_tokens), num_same / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def _normalized(text: str) -> str:
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    if not text.isascii() and any(map(_is_of_another_script, text)):
        text = unicodedata.normalize("NFKC", text).lower()
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split())


def _is_of_another_script(letter: str) -> bool:
    """Return whether this is a letter that is not Latin, or a full-width form; not for signs that Latin text uses."""
    if unicodedata.east_asian_width(letter) in "FW":
        return unicodedata.category(letter) != "So"  # emoji
    is_letter = ord(letter) >= 0x370 and letter.isalpha() and not 0x2000 <= ord(letter) < 0x2C00
    return is_letter and "LATIN" not in unicodedata.name(letter, "")
