"""Metrics as sums and counts, so that their values do not depend on how the work was distributed over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist


@dataclass
class MetricSums:
    """Named sums, counts and extremes of one rank, to be merged over ranks and then divided.

    Ranks may have different names, or none. Use each name with only one of `add`, `add_max` and `add_min`.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, count), float64."""
    maxima: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value_sum: float, count: float) -> None:
        """Add a sum over `count` samples. Reported is sum / count, or the sum if no rank counted a sample."""
        old_sum, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_sum + float(value_sum), old_count + float(count))

    def add_max(self, name: str, value: float) -> None:
        """Report the largest value of all ranks; a NaN stays NaN."""
        self.maxima[name] = _larger(self.maxima.get(name, -math.inf), float(value))

    def add_min(self, name: str, value: float) -> None:
        """Report the smallest value of all ranks; a NaN stays NaN."""
        self.minima[name] = -_larger(-self.minima.get(name, math.inf), -float(value))

    def merge(self, other: MetricSums) -> None:
        """Add all metrics of `other`."""
        for name, (value_sum, count) in other.sums.items():
            self.add(name, value_sum, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, value in other.minima.items():
            self.add_min(name, value)

    def values(self) -> dict[str, float]:
        """Return every metric of this object by name, without other ranks.

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
        """Return every metric, merged over the ranks of `group` and equal on all of them; does not change this
        object.

        Every rank of `group` must call this, even without metrics. Ranks with the same samples (those of one
        model-parallel group) must not all be in `group`, because their samples would count several times.

        Args:
            group: None: all ranks; without torch.distributed, this process alone.

        Raises:
            ValueError: if a name was used in two ways.
        """
        if not dist.is_initialized():
            return self.values()
        # One collective suffices for any mix of names; merging in rank order makes the float64 sums equal on all
        # ranks.
        parts: list[bytes] = [b""] * dist.get_world_size(group)
        dist.all_gather_object(parts, msgspec.msgpack.encode(self), group=group)
        merged = MetricSums()
        for part in parts:
            merged.merge(msgspec.msgpack.decode(part, type=MetricSums))
        return merged.values()


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
