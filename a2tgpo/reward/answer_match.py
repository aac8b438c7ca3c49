"""Exact match and token F1 between an answer and its golds, after SQuAD normalisation (Eq. 14).

SQuAD's rules know ASCII punctuation and words between spaces. Text that holds another script than Latin is therefore
brought to Unicode's compatibility form (full-width digits and letters become plain ones), loses all punctuation, and
for F1 every character of a script written without spaces counts as a word. Text in Latin letters is treated by
SQuAD's rules alone, so that scores compare with published ones; but in any text a letter and its accent are one
character, and what cannot be seen does not count. (Some tokenizers compose what they read: their policies could never
write a gold that is not.)
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
"""Thai, Lao, Burmese, Khmer, kana and Han."""
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; empty only for a blank `text`.

    What would disappear, such as "A" or "The The", stays as it was written: it equals the same text alone.
    """
    return _normalized(text) or " ".join(text.split())


def is_kept_as_written(text: str) -> bool:
    """Whether normalisation would leave nothing of `text`, so that it is compared as it is."""
    return not _normalized(text)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer equals any normalised gold, else 0.0; an empty answer equals none."""
    normalized = normalize_answer(answer)
    return float(bool(normalized) and any(normalized == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: Sequence[str]) -> float:
    """Best token F1 over the golds; yes, no and noanswer match only as a whole."""
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
    """A letter that is not Latin, or a full-width form; signs that Latin text may hold as well are neither."""
    if unicodedata.east_asian_width(letter) in "FW":
        return unicodedata.category(letter) != "So"  # emoji
    is_letter = ord(letter) >= 0x370 and letter.isalpha() and not 0x2000 <= ord(letter) < 0x2C00
    return is_letter and "LATIN" not in unicodedata.name(letter, "")
