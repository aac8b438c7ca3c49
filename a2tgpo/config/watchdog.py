"""Time limits of the start and of a step's stages."""

from dataclasses import dataclass, fields

from a2tgpo.io.errors import require

STARTUP = ("assemble", "restore")
"""Stages of a start after the ranks have met."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Longest time that a rank may spend in a stage, seconds, from its own entry; 0: no limit.

    After a rank has completed a stage once, its limit is `slack` times the longest duration so far, but at least
    `min_s` and at most the stage's limit.

    A rank that waits for another is itself in a stage, so the shortest limit finds a rank that hangs. No limit should
    exceed parallel.timeout_s; otherwise the collectives time out first, and they cannot name the cause.
    """

    rollout_s: float = 7200.0
    """Rollout, including gains."""
    evaluation_s: float = 7200.0
    score_s: float = 3600.0
    update_s: float = 3600.0
    startup_s: float = 3600.0
    """Building the model and the engine; the same limit again for reading the checkpoint."""
    other_s: float = 2400.0
    """Any other stage, including the wait for other ranks' rollouts, and the time between stages."""
    slack: float = 10.0
    """0: the stages' limits always apply unchanged."""
    min_s: float = 300.0
    slow_ratio: float = 1.5
    """Warn if one rank's rollout takes this many times the median rank's in `slow_steps` consecutive steps."""
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
