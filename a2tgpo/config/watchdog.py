"""Time limits of the start and of the stages of a step."""

from dataclasses import dataclass, fields

from a2tgpo.io.errors import require

STARTUP = ("assemble", "restore")
"""Stages of a start, after the ranks have met."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Deadlines in seconds, on each rank from when it enters the stage; 0: none.

    They are the most that a stage may take. Once it has been over on a rank, the rank ends it at `slack` times the
    longest that it has taken so far, and not before `min_s`.

    A rank that waits for another is itself in a stage, so the shortest deadline finds a rank that hangs. None should
    be above parallel.timeout_s, or the collectives' time-out comes first, which cannot tell the cause.
    """

    rollout_s: float = 7200.0
    """Rollout, gain included."""
    evaluation_s: float = 7200.0
    score_s: float = 3600.0
    update_s: float = 3600.0
    startup_s: float = 3600.0
    """Building the model and the engine, and reading the checkpoint; each has as long."""
    other_s: float = 2400.0
    """Any other stage, waiting for other ranks' rollouts included, and the time between stages."""
    slack: float = 10.0
    """0: a stage may always take as long as its field says."""
    min_s: float = 300.0
    slow_ratio: float = 1.5
    """Say so when the same rank's rollout takes this many times the median rank's, `slow_steps` times in a row."""
    slow_steps: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_s"):
                require(
                    getattr(self, field.name) >= 0,
                    f"watchdog.{field.name}",
                    getattr(self, field.name),
                    ">= 0",
                )
        require(self.slack == 0 or self.slack > 1, "watchdog.slack", self.slack, "> 1, or 0")
        require(self.slow_ratio > 1, "watchdog.slow_ratio", self.slow_ratio, "> 1")
        require(self.slow_steps >= 1, "watchdog.slow_steps", self.slow_steps, ">= 1")

    def deadline(self, stage: str) -> tuple[str, float]:
        """Return the field that limits `stage`, and its seconds."""
        by_stage = {"rollout": self.rollout_s, "evaluation": self.evaluation_s, "score": self.score_s}
        by_stage["update"] = self.update_s
        if stage in STARTUP:
            return "watchdog.startup_s", self.startup_s
        return (
            (f"watchdog.{stage}_s", by_stage[stage])
            if stage in by_stage
            else ("watchdog.other_s", self.other_s)
        )
