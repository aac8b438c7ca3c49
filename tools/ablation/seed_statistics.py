"""Compute means over seeds and their uncertainty from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its uncertainty."""

    mean: float
    """NaN if there is no value."""
    half_width: float | None
    """Half of the 95 % interval (Student's t); None for fewer than two values."""
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width

    def text(self, spec: str = ".3f") -> str:
        """ "0.512 ± 0.034"; a question mark for an unknown interval."""
        if self.count == 0:
            return "–"
        width = "?" if self.half_width is None else format(self.half_width, spec.lstrip("+"))
        mean = round(self.mean, 9) + 0.0  # rounding to -0 would print a sign
        return f"{mean:{spec}} ± {width}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval of independent, normally distributed values."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, None, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Estimate:
    """Return the mean of `values` - `base` over the seeds that both have.

    Runs of one seed draw the same prompts in the same order, so the difficulty of a seed's prompts cancels.
    """
    return estimate([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])


def t_quantile(degrees: int) -> float:
    """Return t with P(|T| <= t) = 0.95 for Student's T, to rounding; `degrees` of freedom >= 1."""
    low, high = 0.0, 1000.0
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_coverage(middle, degrees) < CONFIDENCE else (low, middle)
    return 0.5 * (low + high)


def t_coverage(t: float, degrees: int) -> float:
    """Return P(|T| <= t) for Student's T: finite sums of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    term, total = math.cos(angle) ** (degrees % 2), 0.0
    for power in range(degrees % 2, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    partial = math.sin(angle) * total
    return partial if degrees % 2 == 0 else 2 / math.pi * (angle + partial)
