"""Collect metrics as sums and counts, so that a metric does not depend on how the work was divided over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist


@dataclass
class MetricSums:
    """The metrics of one rank. For each name, it holds a maximum, a minimum, or a sum with its count.

    `reduce` merges the sums of all ranks and then divides each sum by its count. Ranks may have different metrics.
    Use a name with only one of `add`, `add_max` and `add_min`.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(sum, count) of each name."""
    maxima: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value_sum: float, count: float) -> None:
        """Add `value_sum`, a sum over `count` samples, to metric `name`.

        The metric's value is the total sum divided by the total count, or the total sum if the total count is 0.
        """
        old_sum, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_sum + float(value_sum), old_count + float(count))

    def add_max(self, name: str, value: float) -> None:
        """Add `value` to metric `name`. The metric is the largest value on any rank, or NaN if a value is NaN."""
        self.maxima[name] = _larger(self.maxima.get(name, -math.inf), float(value))

    def add_min(self, name: str, value: float) -> None:
        """Add `value` to metric `name`. The metric is the smallest value on any rank, or NaN if a value is NaN."""
        self.minima[name] = -_larger(-self.minima.get(name, math.inf), -float(value))

    def merge(self, other: MetricSums) -> None:
        """Add all values that were added to `other`."""
        for name, (value_sum, count) in other.sums.items():
            self.add(name, value_sum, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, value in other.minima.items():
            self.add_min(name, value)

    def values(self) -> dict[str, float]:
        """Return the value of every metric by its name, computed from this rank alone.

        Raises:
            ValueError: if a name was used with two of `add`, `add_max` and `add_min`.
        """
        twice = (
            (self.sums.keys() & self.maxima)
            | (self.sums.keys() & self.minima)
            | (self.maxima.keys() & self.minima)
        )
        if twice:
            raise ValueError(
                f"metric {min(twice)!r} was added both as a sum and as an extreme, or as max and min"
            )
        means = {name: total / count if count else total for name, (total, count) in self.sums.items()}
        return dict(sorted({**means, **self.maxima, **self.minima}.items()))

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return the value of every metric, computed from all ranks of `group` and equal on all of them.

        Every rank of `group` must call this, even if it has no metrics. The ranks of one model-parallel group have
        the same samples, so only one of them may be in `group`.

        Args:
            group: the ranks to merge. None: all ranks, or only this process if torch.distributed is not initialised.

        Raises:
            ValueError: if a name was used with two of `add`, `add_max` and `add_min`.
        """
        if not dist.is_initialized():
            return self.values()
        # Every rank merges the parts in rank order, so the float64 sums are equal on all ranks.
        parts: list[bytes] = [b""] * dist.get_world_size(group)
        dist.all_gather_object(parts, msgspec.msgpack.encode(self), group=group)
        merged = MetricSums()
        for part in parts:
            merged.merge(msgspec.msgpack.decode(part, type=MetricSums))
        return merged.values()


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
