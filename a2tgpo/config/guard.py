"""Limits of a step's metrics; a metric past its limit suggests that the run is going wrong."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limits of a step's metrics. An alarm starts if a metric is past its limit in two consecutive steps, and ends if
    the metric is within its limit in two consecutive steps.

    Some limits are relative to a metric's baseline, which is its mean over the run's first steps. A limit of 0 turns
    its alarm off.
    """

    baseline_steps: int = 5
    """A metric's baseline is its mean over this number of first steps. During these steps, alarms that need a
    baseline are off."""
    min_entropy_share: float = 0.1
    """Alarm if the entropy falls below this share of its baseline, because the policy has then collapsed."""
    max_likelihood_drop: float = 0.5
    """Alarm if the mean log-prob of the sampled tokens in correctly answered trajectories is below its baseline by
    more than this number of nats per token."""
    max_format_error_rise: float = 0.2
    """Alarm if the share of malformed responses exceeds its baseline by more than this number."""
    max_noise_share: float = 0.5
    """Alarm if the rounding noise in the ratio, divided by the smaller of clip_low and clip_high, exceeds this
    number."""
    max_train_engine_gap: float = 0.05
    """Alarm if the mean absolute difference between the log-probs of trainer and engine exceeds this number of nats
    per token."""
    max_failed_calls: float = 0.2
    """Alarm if the share of a step's tool calls that fail exceeds this number."""
    stop_after: int = 0
    """If this many consecutive steps had an alarm, the run saves and stops with exit code 3. 0: alarms never stop the
    run."""
    stop_after_skipped: int = 5
    """If this many consecutive steps each skipped an update that was not finite, the run saves and stops with exit
    code 3. 0: skipped updates never stop the run."""

    def __post_init__(self) -> None:
        require(self.baseline_steps >= 1, "guard.baseline_steps", self.baseline_steps, ">= 1")
        require(
            0 <= self.min_entropy_share < 1, "guard.min_entropy_share", self.min_entropy_share, "in [0, 1)"
        )
        for name in (
            "max_likelihood_drop",
            "max_format_error_rise",
            "max_noise_share",
            "max_train_engine_gap",
            "max_failed_calls",
            "stop_after",
            "stop_after_skipped",
        ):
            require(getattr(self, name) >= 0, f"guard.{name}", getattr(self, name), ">= 0")
