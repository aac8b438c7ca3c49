"""Limits of a step's metrics, beyond which an alarm warns that the run is going wrong."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limits of a step's metrics. An alarm starts after two consecutive steps in which a metric is past its
    limit. The alarm ends after two consecutive steps within the limit. A limit of 0 turns its alarm off.
    """

    baseline_steps: int = 5
    """Number of steps at the start of the run. A metric's baseline is its mean over these steps. Alarms that need a
    baseline are off during these steps."""
    min_entropy_share: float = 0.1
    """Alarm if the entropy falls below this share of its baseline. The policy has then collapsed."""
    max_likelihood_drop: float = 0.5
    """Alarm if the mean log-prob of sampled tokens in correct trajectories falls this many nats per token below its
    baseline."""
    max_format_error_rise: float = 0.2
    """Alarm if the share of malformed responses rises above its baseline by more than this."""
    max_noise_share: float = 0.5
    """Alarm if the ratio's rounding noise exceeds this multiple of the smaller of clip_low and clip_high. Only steps
    of three or more mini-batches measure the noise."""
    max_train_engine_gap: float = 0.05
    """Alarm if the log-probs of trainer and engine differ by more than this on average, in nats per token."""
    max_failed_calls: float = 0.2
    """Alarm if more than this share of a step's tool calls fails."""
    stop_after: int = 0
    """After this many consecutive steps with an alarm, the run saves and stops with exit code 3. `0`: never."""
    stop_after_skipped: int = 5
    """After this many consecutive steps whose update was skipped because it was not finite, the run saves and stops
    with exit code 3. `0`: never."""

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
