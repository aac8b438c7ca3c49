"""Estimate how much of a ratio's distance from 1 is rounding noise, and advise which settings to change.

At a step's first mini-batch, the training pass has the weights with which the old log-probs were computed, so both
computations round in the same way. From the second mini-batch on, the training pass has other weights, so the ratio
contains the full noise. The policy's movement grows from update to update, but the noise does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from a2tgpo.config.run import RunConfig

SPREAD_METRICS = {1: "ratio/mean_square_after_1", 2: "ratio/mean_square_after_2"}
"""Maps the number of updates since the rollout to a metric: the mean of (log s)^2 over all ratios s."""
FIRST_STEPS = 3
"""Number of steps over which the noise is averaged before a line reports it."""


def noise_of(after_one: float, after_two: float) -> float:
    """Return the standard deviation, in nats, that rounding alone causes in log s, the logarithm of a ratio s.

    The mean squares after one update and after two updates are linearly extrapolated to zero updates. If the two
    updates have similar directions, the result is smaller than the true noise.

    Args:
        after_one: mean square of log s after one update.
        after_two: mean square of log s after two updates.
    """
    return math.sqrt(min(max(2 * after_one - after_two, 0.0), after_one))


class RatioNoise:
    """Estimate the noise in a run's ratios, over the steps since the run was last started. Ranks with the same
    metrics get the same results.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self._clip = min(config.algorithm.clip_low, config.algorithm.clip_high)
        self._first: list[tuple[float, float]] | None = []

    def watch(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], str]:
        """Estimate the noise of one step. The metrics must be reduced over all ranks.

        Returns:
            The metrics `ratio/noise` (nats) and `ratio/noise_share`, and a line of text. `ratio/noise_share` is the
            noise divided by the smaller of clip_low and clip_high. A step with fewer than three mini-batches has no
            metrics. The line is "" except after the `FIRST_STEPS`-th measured step, when it reports the noise. If
            the objective has no clipping range, there is no `ratio/noise_share` and no line.
        """
        after_one, after_two = (metrics.get(name, math.nan) for name in SPREAD_METRICS.values())
        if not (math.isfinite(after_one) and math.isfinite(after_two)):
            return {}, ""
        noise = noise_of(after_one, after_two)
        if not self._config.algorithm.has_clipping_range:
            return {"ratio/noise": noise}, ""
        judged = {"ratio/noise": noise, "ratio/noise_share": noise / self._clip}
        if self._first is None:
            return judged, ""
        self._first.append((after_one, after_two))
        if len(self._first) < FIRST_STEPS:
            return judged, ""
        means = [sum(squares) / FIRST_STEPS for squares in zip(*self._first, strict=True)]
        self._first = None
        return judged, self._line(noise_of(*means))

    def _line(self, noise: float) -> str:
        algorithm, share = self._config.algorithm, noise / self._clip
        finding = (
            f"noise of the {algorithm.ratio} ratio over {FIRST_STEPS} steps: {noise:.2g}, {share:.0%} "
            f"of the clipping range (clip_low {algorithm.clip_low:g}, clip_high {algorithm.clip_high:g})"
        )
        limit = self._config.guard.max_noise_share
        if limit == 0 or share <= limit * (1 + 1e-6):
            return f"{finding}: the policy decides what is clipped"
        return f"{finding}: rounding decides what is clipped; {self._advice(share / limit)}"

    def _advice(self, wider: float) -> str:
        config = self._config
        low, high = (
            round_up(wider * clip) for clip in (config.algorithm.clip_low, config.algorithm.clip_high)
        )
        fp8 = "turn model.fp8 off, or " if config.model.fp8.enabled else ""
        return (
            f"{fp8}set update.prompts_per_minibatch={config.rollout.prompts_per_step} (one mini-batch a step: no "
            f"noise, no clipping), or algorithm.clip_low={low:g} algorithm.clip_high={high:g}"
        )


def round_up(value: float) -> float:
    """Return the positive `value`, rounded up to two significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit - 1e-9) * unit
