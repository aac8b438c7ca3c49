"""Describe a question set: counts, duplicates, lengths, overlap with another set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from a2tgpo.data.question_set import Question
from a2tgpo.reward.answer_match import is_kept_as_written, normalize_answer

PERCENTILES = (0, 5, 50, 95, 100)


def describe_questions(
    questions: Sequence[Question], left_out: Counter[str], others: Sequence[Question] | None
) -> dict:
    """Return plain values for a JSON report.

    Args:
        questions: the set as written.
        left_out: number of the source's items that make no question, by reason.
        others: a set to compare for overlap, such as the training set; None: no comparison.
    """
    texts = Counter(normalize_answer(question.question) for question in questions)
    first_golds = [normalize_answer(question.answers[0]) for question in questions]
    report = {
        "questions": len(questions),
        "left_out": dict(sorted(left_out.items())),
        "repeated_questions": sum(count - 1 for count in texts.values()),
        "yes_no_answers": sum(gold in ("yes", "no") for gold in first_golds),
        # "The The" or "?" would normalise to nothing, so only exactly the same text is right.
        "answers_empty_when_normalized": sum(
            any(map(is_kept_as_written, question.answers)) for question in questions
        ),
        "non_ascii_questions": sum(not question.question.isascii() for question in questions),
        "hops": dict(sorted(Counter(question.hops for question in questions).items())),
        "answers_per_question": _percentiles([len(question.answers) for question in questions]),
        "question_words": _percentiles([len(question.question.split()) for question in questions]),
        "answer_words": _percentiles([len(question.answers[0].split()) for question in questions]),
    }
    if others is not None:
        known = {normalize_answer(question.question) for question in others}
        shared = sum(count for text, count in texts.items() if text in known)
        report["overlap"] = {"questions": shared, "share": round(shared / len(questions), 4)}
    return report


def _percentiles(values: Sequence[int]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
