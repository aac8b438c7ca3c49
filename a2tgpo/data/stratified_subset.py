"""Select a subset of a question set that keeps the shares of sources and numbers of hops."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.data.question_set import Question

_UNLABELLED = ("", 0)


def stratified_subset(questions: Sequence[Question], count: int) -> list[Question]:
    """Return `count` of `questions` in their order, or all of them if there are fewer. Nothing is random.

    Questions with the same source and number of hops form a stratum. Each stratum gets a share of `count` in
    proportion to its size, rounded by largest remainders. The subset takes the first questions of a stratum. From a
    stratum without source and hops, it takes questions at equal distances instead, because the file may concatenate
    sets.
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
    """Return whole numbers that add up to `count`, in proportion to `sizes`."""
    total = sum(sizes)
    shares = [size * count // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(sizes[index] * count % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares
