"""Test the contrasts that were fixed before a comparison began."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from seed_statistics import estimate, paired_differences

from a2tgpo.io.tables import markdown_table
from runs import RunResult

SCORE = "evaluation/em"


def area(result: RunResult) -> float:
    """Return the mean of held-out exact match over a finished run: the area under its curve, divided by its number of
    steps.

    The curve is straight between two evaluations. For a run of 0 steps, the result is its only score.
    """
    points = [(record["step"], record[SCORE]) for record in result.evaluations()]
    pairs = list(itertools.pairwise(points))
    if not pairs:
        return points[0][1]
    sums = math.fsum((after[0] - before[0]) * (before[1] + after[1]) / 2 for before, after in pairs)
    return sums / (points[-1][0] - points[0][0])


def areas(results: Sequence[RunResult]) -> dict[str, dict[int, float]]:
    """Return {method: {seed: area}} of the finished runs."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        found.setdefault(result.run.method, {})[result.run.seed] = area(result)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's correction, in the same order (Holm 1979)."""
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def contrast_differences(contrast: str, scores: Mapping[str, Mapping[int, float]]) -> list[float]:
    """Return the differences of the contrast "METHOD-BASE", one for each seed that both methods have.

    Args:
        scores: {method: {seed: score}}.
    """
    method, base = contrast.split("-")
    return paired_differences(scores.get(method, {}), scores.get(base, {}))


def contrasts_text(contrasts: Sequence[str], scores: Mapping[str, Mapping[int, float]]) -> str:
    """Return a table with the mean difference of each contrast "METHOD-BASE", its interval and its p-values.

    A contrast with fewer than two seeds has no p-value, and the correction does not include it.
    """
    means = [estimate(contrast_differences(contrast, scores)) for contrast in contrasts]
    p_values = [mean.p_value for mean in means]
    known = [p for p in p_values if p is not None]
    corrected = iter(holm(known))
    rows = [
        [
            contrast.replace("-", " - "),
            str(mean.count),
            mean.text("+.4f"),
            "?" if p is None else f"{p:.3f}",
            "?" if p is None else f"{next(corrected):.3f}",
        ]
        for contrast, mean, p in zip(contrasts, means, p_values, strict=True)
    ]
    note = (
        "The outcome is the mean of held-out exact match over the run (the area under its curve). A difference is "
        "computed seed by seed. p is of Student's paired t-test; the last column corrects it for the number of "
        "contrasts (Holm)."
    )
    return markdown_table(["contrast", "seeds", "difference", "p", "p (Holm)"], rows) + f"\n\n{note}"
