"""Limits past which a run seems to go wrong."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Alarms on a step's metrics, some relative to the baseline, their mean over the run's first steps. 0: no alarm.

    An alarm starts at the second consecutive step past its limit and ends at the second within it.
    """

    baseline_steps: int = 5
    """Steps whose mean is the baseline; until then alarms that need it are off."""
    min_entropy_share: float = 0.1
    """Alarm if entropy falls below this share of the baseline: the policy has collapsed."""
    max_likelihood_drop: float = 0.5
    """Alarm if the sampled tokens of correct answers have lost this much log-prob, nats per token."""
    max_format_error_rise: float = 0.2
    """Alarm if the share of malformed responses has grown by this much."""
    max_noise_share: float = 0.5
    """Alarm if the ratio's noise exceeds this share of the smaller of clip_low and clip_high."""
    max_train_engine_gap: float = 0.05
    """Alarm if trainer and engine differ by more than this, mean absolute nats per token."""
    max_failed_calls: float = 0.2
    """Alarm if a larger share of a step's tool calls fails."""
    stop_after: int = 0
    """Save and stop, with exit code 3, after this many consecutive steps with an alarm; 0: never."""
    stop_after_skipped: int = 5
    """Save and stop, with exit code 3, after this many consecutive steps that skip a non-finite update; 0: never."""

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
