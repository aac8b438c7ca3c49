"""Find a rank that is slower than the others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LOCAL_STAGE = "rollout"
"""The only stage in which ranks do not wait for each other. In other stages, a slow rank delays all ranks equally."""


class SlowRanks:
    """Compare the time that each rank spent in each stage. Only rank 0 needs an instance.

    Args:
        ratio: a rank is slow if its rollout takes more than `ratio` times the median over all ranks.
        steps: if the same rank is slow in this many consecutive steps, a line reports the rank.
    """

    def __init__(self, *, ratio: float, steps: int):
        self._ratio = ratio
        self._steps = steps
        self._suspect: int | None = None
        self._streak = 0

    def compare(self, by_rank: Sequence[dict[str, float]]) -> tuple[dict[str, float], str]:
        """Compare the times of all ranks in one step.

        Args:
            by_rank: each rank's metrics `time/STAGE_s`, in rank order.

        Returns:
            The metrics `time/STAGE_min_s`, `time/STAGE_max_s` and `time/STAGE_slowest_rank`, and a line of text. With
            a single rank, there are no metrics. The line names a rank if this step is the `steps`-th consecutive step
            in which the same rank is slow. Otherwise the line is "".
        """
        if len(by_rank) < 2:
            return {}, ""
        spread: dict[str, float] = {}
        for name in by_rank[0]:
            seconds = [times.get(name, 0.0) for times in by_rank]
            stage = name.removesuffix("_s")
            spread[f"{stage}_min_s"], spread[f"{stage}_max_s"] = min(seconds), max(seconds)
            spread[f"{stage}_slowest_rank"] = float(seconds.index(max(seconds)))
        return spread, self._watch([times.get(f"time/{LOCAL_STAGE}_s", 0.0) for times in by_rank])

    def _watch(self, seconds: list[float]) -> str:
        slowest, median = max(seconds), statistics.median_low(seconds)
        rank = seconds.index(slowest) if slowest > self._ratio * median else None
        self._streak = (
            self._streak + 1 if rank is not None and rank == self._suspect else int(rank is not None)
        )
        self._suspect = rank
        if rank is None or self._streak != self._steps:
            return ""
        return (
            f"rank {rank} is slow: its {LOCAL_STAGE} took {slowest:.1f} s, the median {median:.1f} s, "
            f"for {self._steps} steps in a row"
        )
