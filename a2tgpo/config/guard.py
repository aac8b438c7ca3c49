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
    """Number of first steps over which a metric's baseline is the mean. In these steps, alarms that need a baseline
    are off."""
    min_entropy_share: float = 0.1
    """Alarm if the entropy falls below this share of its baseline, because the policy has then collapsed."""
    max_likelihood_drop: float = 0.5
    """Alarm if the mean log-prob of the sampled tokens in correctly answered trajectories is more than this far below
    its baseline, nats per token."""
    max_format_error_rise: float = 0.2
    """Alarm if the share of malformed responses exceeds its baseline by more than this."""
    max_noise_share: float = 0.5
    """Alarm if rounding noise in the ratio exceeds this share of the clipping range, the smaller of clip_low and
    clip_high."""
    max_train_engine_gap: float = 0.05
    """Alarm if the log-probs of trainer and engine differ by more than this, mean absolute difference in nats per
    token."""
    max_failed_calls: float = 0.2
    """Alarm if more than this share of a step's tool calls fails."""
    stop_after: int = 0
    """Save and stop the run, with exit code 3, if this many consecutive steps had an alarm; 0: never."""
    stop_after_skipped: int = 5
    """Save and stop the run, with exit code 3, if this many consecutive steps each skipped an update that was not
    finite; 0: never."""

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
