"""Limits of the alarms that show a failing run."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Alarms on a step's metrics; those on change compare with the mean of the run's first steps. 0 turns one off.

    An alarm starts at the second step in a row past its limit and ends at the second within it.
    """

    baseline_steps: int = 5
    """Steps whose mean is the base line; no alarm on change before."""
    min_entropy_share: float = 0.1
    """Alarm below this share of the base line's entropy: the policy has collapsed onto one course."""
    max_likelihood_drop: float = 0.5
    """Alarm when right answers' sampled tokens have lost so much log-prob, nats per token."""
    max_format_error_rise: float = 0.2
    """Alarm when the share of ill-formed responses has grown by so much."""
    max_noise_share: float = 0.5
    """Alarm when the ratio's noise passes this share of the smaller of clip_low and clip_high."""
    max_train_engine_gap: float = 0.05
    """Alarm when trainer and engine differ by more, mean absolute nats per token."""
    max_failed_calls: float = 0.2
    """Alarm when a larger share of a step's tool calls has failed."""
    stop_after: int = 0
    """Save and stop, with exit code 3, after so many steps in a row with an alarm; 0: never."""

    stop_after_skipped: int = 5
    """Save and stop alike after so many steps in a row in which an update was skipped as not finite; 0: never."""

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
