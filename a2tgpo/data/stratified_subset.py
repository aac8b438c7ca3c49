"""Select a subset of a question set in which every source and number of hops keeps its share."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.data.question_set import Question

_UNLABELLED = ("", 0)


def stratified_subset(questions: Sequence[Question], count: int) -> list[Question]:
    """Select `count` of `questions` in their order, deterministically; all of them if there are no more.

    Each pair of source and hops is a stratum with a proportional share of `count`, rounded so that the shares add up
    (largest remainders first). The first questions of a stratum are selected. Questions with neither source nor hops
    form one stratum, selected at equal distances, because the file may concatenate several sets.

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
    """Divide `count` in proportion to `sizes`, in whole numbers."""
    total = sum(sizes)
    shares = [size * count // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(sizes[index] * count % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares
