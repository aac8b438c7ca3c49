"""Exact match and token F1 between an answer and its gold answers, after SQuAD normalisation (Eq. 14).

Text in Latin letters follows SQuAD's rules, so that its scores can be compared with published scores. SQuAD's rules
remove only ASCII punctuation, and split text into words only at spaces. If a text has letters of a script other than
Latin, this module also converts the text to Unicode's compatibility form (NFKC) and removes all punctuation. For F1,
each character of a script without spaces is a word. In every text, invisible characters are removed and accents are
composed (NFC), because some tokenizers compose their input.
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
"""Characters of the scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han."""
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def normalize_answer(text: str) -> str:
    """Return `text` in lower case, without punctuation or articles, and with single spaces.

    If nothing would remain, as for "A" or "The The", only change the spaces of `text`.
    """
    return _normalized(text) or " ".join(text.split())


def is_kept_as_written(text: str) -> bool:
    """Return whether `normalize_answer` keeps `text`, because normalisation would remove all of it."""
    return not _normalized(text)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the normalised answer is not empty and equals a normalised gold answer, else 0.0."""
    normalized = normalize_answer(answer)
    return float(bool(normalized) and any(normalized == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: Sequence[str]) -> float:
    """Return the highest token F1 of `answer` over all gold answers.

    If the answer or the gold answer is `yes`, `no` or `noanswer`, F1 is 1.0 if the two are equal, else 0.0.
    """
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
    """Return whether `letter` belongs to a script other than Latin, or is full-width and not an emoji."""
    if unicodedata.east_asian_width(letter) in "FW":
        return unicodedata.category(letter) != "So"  # emoji
    is_letter = ord(letter) >= 0x370 and letter.isalpha() and not 0x2000 <= ord(letter) < 0x2C00
    return is_letter and "LATIN" not in unicodedata.name(letter, "")
