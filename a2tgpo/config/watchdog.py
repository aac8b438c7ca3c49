"""Time limits of a start's stages and of a step's stages."""

from dataclasses import dataclass, fields

from a2tgpo.io.errors import require

STARTUP = ("assemble", "restore")
"""Stages of a start that follow the rendezvous of the ranks."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Longest time, in seconds, that a rank may spend in a stage, counted from the moment when this rank enters the
    stage; 0: no limit.

    If a rank has completed a stage before, a shorter limit applies: `slack` times the stage's longest duration so
    far, but at least `min_s` and at most the stage's own limit.

    If one rank hangs, others wait for it in stages of their own, and the shortest of these limits ends the job. No
    limit should exceed parallel.timeout_s, because collectives would then time out first, and their errors do not
    name the cause.
    """

    rollout_s: float = 7200.0
    """Limit of the rollout, which includes the computation of gains."""
    evaluation_s: float = 7200.0
    """Limit of an evaluation."""
    score_s: float = 3600.0
    """Limit of scoring the trajectories with the trainer."""
    update_s: float = 3600.0
    """Limit of a step's optimizer steps."""
    startup_s: float = 3600.0
    """Limit of building the model and the engine. The same limit applies separately to reading the checkpoint."""
    other_s: float = 2400.0
    """Limit of every other stage, for example of the stage in which a rank waits for other ranks' rollouts. The time
    between two stages has the same limit."""
    slack: float = 10.0
    """Number > 1 by which a stage's longest duration so far is multiplied to get its shorter limit. 0: no shorter
    limits."""
    min_s: float = 300.0
    """Lower bound, in seconds, of the limits that `slack` gives."""
    slow_ratio: float = 1.5
    """If one rank's rollout takes more than this many times as long as the median rank's, the rank is slow. A warning
    names a rank that is slow in `slow_steps` consecutive steps."""
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
        """Return the dotted key of the field that limits `stage`, and that field's value in seconds."""
        by_stage = {"rollout": self.rollout_s, "evaluation": self.evaluation_s, "score": self.score_s}
        by_stage["update"] = self.update_s
        if stage in STARTUP:
            return "watchdog.startup_s", self.startup_s
        return (
            (f"watchdog.{stage}_s", by_stage[stage])
            if stage in by_stage
            else ("watchdog.other_s", self.other_s)
        )
