"""A part of a question set in which every source and every number of hops has its share."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.data.question_set import Question

_UNLABELLED = ("", 0)


def stratified_subset(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` of `questions` in their order, the same in every run; all of them where there are no more.

    Each pair of source and hops is a stratum and gets its share of `count`, rounded so that the shares add up
    (largest remainders first). The first questions of a stratum are taken. Questions with neither source nor hops are
    one stratum, taken evenly from where they stand in the file: it may be several sets behind each other.

    Args:
        questions: the set.
        count: at least 0.
    """
    if count >= len(questions):
        return list(questions)
    strata: dict[tuple[str, int], list[int]] = {}
    for index, question in enumerate(questions):
        strata.setdefault((question.source, question.hops), []).append(index)
    shares = _shares([len(members) for members in strata.values()], count)
    chosen: list[int] = []
    for (label, members), share in zip(strata.items(), shares, strict=True):
        places: Sequence[int] = range(share)
        if label == _UNLABELLED:
            places = [place * len(members) // share for place in places]
        chosen += [members[place] for place in places]
    return [questions[index] for index in sorted(chosen)]


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` in proportion to `sizes`, in whole numbers."""
    total = sum(sizes)
    shares = [size * count // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(sizes[index] * count % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares
