"""Exact match and token F1 between an answer and its golds, after SQuAD normalisation (Eq. 14)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer equals any normalised gold, else 0.0."""
    normalized = normalize_answer(answer)
    return float(any(normalized == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: Sequence[str]) -> float:
    """Best token F1 over the golds; yes, no and noanswer match only as a whole."""
    return max((_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golds), default=0.0)


def _f1(answer: str, gold: str) -> float:
    closed = ("yes", "no", "noanswer")
    if answer != gold and (answer in closed or gold in closed):
        return 0.0
    answer_tokens, gold_tokens = answer.split(), gold.split()
    num_same = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(answer_tokens), num_same / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)
