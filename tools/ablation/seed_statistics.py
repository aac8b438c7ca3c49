"""Compute means over seeds, and the uncertainty of these means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its uncertainty."""

    mean: float
    """The mean, or NaN if no seed has a value."""
    half_width: float | None
    """Half the width of the 95 % interval (Student's t), or None for fewer than two values."""
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of Student's t-test that the mean is 0, or None for fewer than two values."""
        if self.half_width is None:
            return None
        if self.half_width == 0:
            return 0.0 if self.mean else 1.0
        degrees = self.count - 1
        return 1 - t_coverage(abs(self.mean) * t_quantile(degrees) / self.half_width, degrees)

    def text(self, spec: str = ".3f") -> str:
        """Return a text such as "0.512 ± 0.034", or "0.512 ± ?" if the interval is unknown."""
        if self.count == 0:
            return "–"
        width = "?" if self.half_width is None else format(self.half_width, spec.lstrip("+"))
        mean = round(self.mean, 9) + 0.0  # + 0.0 turns -0.0 into 0.0, which prints without a sign
        return f"{mean:{spec}} ± {width}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values` and its 95 % interval, for independent and normally distributed values."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, None, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def paired_differences(values: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Return `values[seed] - base[seed]` for the seeds that both mappings have, in the order of the seeds.

    Runs with the same seed draw the same prompts, so the prompts' difficulty cancels in the difference.
    """
    return [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Estimate:
    """Return the mean of the `paired_differences`."""
    return estimate(paired_differences(values, base))


def t_quantile(degrees: int) -> float:
    """Return the t for which P(|T| <= t) = 0.95, for Student's T with `degrees` >= 1 degrees of freedom."""
    low, high = 0.0, 1000.0
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_coverage(middle, degrees) < CONFIDENCE else (low, middle)
    return 0.5 * (low + high)


def t_coverage(t: float, degrees: int) -> float:
    """Return P(|T| <= t) for Student's T with `degrees` degrees of freedom.

    The finite sums are from Abramowitz and Stegun: 26.7.3 if `degrees` is odd, 26.7.4 if it is even.
    """
    angle = math.atan(t / math.sqrt(degrees))
    term, total = math.cos(angle) ** (degrees % 2), 0.0
    for power in range(degrees % 2, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    partial = math.sin(angle) * total
    return partial if degrees % 2 == 0 else 2 / math.pi * (angle + partial)
