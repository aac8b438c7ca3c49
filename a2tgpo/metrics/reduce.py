"""Metrics as sums and counts, so that they mean the same however the work was spread over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist


@dataclass
class MetricSums:
    """Named sums, counts and extremes of one rank; merged over ranks, divided once.

    Ranks may hold different names, or none. A name is used in one way only: with `add`, `add_max` or
    `add_min`.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, count), float64."""
    maxima: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value_sum: float, count: float) -> None:
        """Add a sum over `count` samples. Reported: sum / count; the sum itself where no rank counted any sample."""
        old_sum, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_sum + float(value_sum), old_count + float(count))

    def add_max(self, name: str, value: float) -> None:
        """Report the largest value seen on any rank; NaN, once seen, stays."""
        self.maxima[name] = _larger(self.maxima.get(name, -math.inf), float(value))

    def add_min(self, name: str, value: float) -> None:
        """Report the smallest value seen on any rank; NaN, once seen, stays."""
        self.minima[name] = -_larger(-self.minima.get(name, math.inf), -float(value))

    def merge(self, other: MetricSums) -> None:
        """Add everything that `other` holds."""
        for name, (value_sum, count) in other.sums.items():
            self.add(name, value_sum, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, value in other.minima.items():
            self.add_min(name, value)

    def values(self) -> dict[str, float]:
        """Every metric of what this object holds, by name.

        Raises:
            ValueError: if a name was used in two ways.
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
        """Every metric over the ranks of `group`, equal on all of them; this object is left as it was.

        Every rank of `group` must call this, also one that holds nothing. Ranks that hold the same samples
        (those of one model-parallel group) must not all be in `group`, or their counts would be inflated.

        Args:
            group: None: all ranks; without torch.distributed, this process alone.

        Raises:
            ValueError: if a name was used in two ways.
        """
        if not dist.is_initialized():
            return self.values()
        # One collective for any mix of names; merging in rank order makes the float64 sums equal on all
        # ranks.
        parts: list[bytes] = [b""] * dist.get_world_size(group)
        dist.all_gather_object(parts, msgspec.msgpack.encode(self), group=group)
        merged = MetricSums()
        for part in parts:
            merged.merge(msgspec.msgpack.decode(part, type=MetricSums))
        return merged.values()


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
