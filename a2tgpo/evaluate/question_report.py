"""Describe a question set: count its questions and duplicates, measure lengths, and compare it with another set."""

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
    """Return the description of a question set, as plain values for a JSON report.

    Args:
        left_out: the number of source items that were left out, by reason.
        others: another set, for example the training set. The report then gives the number of questions that are in
            both sets.
    """
    texts = Counter(normalize_answer(question.question) for question in questions)
    first_golds = [normalize_answer(question.answers[0]) for question in questions]
    report = {
        "questions": len(questions),
        "left_out": dict(sorted(left_out.items())),
        "repeated_questions": sum(count - 1 for count in texts.values()),
        "yes_no_answers": sum(gold in ("yes", "no") for gold in first_golds),
        # An answer such as "The The" or "?" is compared as written, so only exactly the same text matches.
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
