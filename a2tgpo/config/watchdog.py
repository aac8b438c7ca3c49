"""Time limits for the stages of a program's start and of a training step."""

from dataclasses import dataclass, fields

from a2tgpo.io.errors import require

STARTUP = ("assemble", "restore")
"""Stages of a start after the rendezvous of the ranks."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Longest time, in seconds, that a rank may spend in a stage; 0: no limit.

    After a rank has first completed a stage, a shorter limit replaces the stage's own limit. The shorter limit is
    `slack` times the rank's longest duration of the stage, but at least `min_s` and at most the stage's own
    limit.

    If one rank hangs, the other ranks wait for it in other stages. The shortest limit of all these stages ends the
    job. No limit should exceed parallel.timeout_s: a collective would time out first, and its error does not name the
    cause.
    """

    rollout_s: float = 7200.0
    """Limit of the rollout, including the computation of gains."""
    evaluation_s: float = 7200.0
    """Limit of an evaluation."""
    score_s: float = 3600.0
    """Limit of scoring trajectories with the trainer."""
    update_s: float = 3600.0
    """Limit of a step's optimizer steps."""
    startup_s: float = 3600.0
    """Limit of building the model and the engine, and also of reading the checkpoint."""
    other_s: float = 2400.0
    """Limit of every other stage, such as waiting for other ranks' rollouts, and of the time between stages."""
    slack: float = 10.0
    """Once a rank has completed a stage, the stage's limit becomes this many (> 1) times its longest duration so far.
    `0`: the limit does not change."""
    min_s: float = 300.0
    """Lower bound, in seconds, of every limit that is computed from `slack`."""
    slow_ratio: float = 1.5
    """A rank is slow if its rollout takes more than this many times as long as the median rank's. A warning names a
    rank that is slow in `slow_steps` consecutive steps."""
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
        """Return the key of the field that limits `stage`, and its value in seconds."""
        by_stage = {"rollout": self.rollout_s, "evaluation": self.evaluation_s, "score": self.score_s}
        by_stage["update"] = self.update_s
        if stage in STARTUP:
            return "watchdog.startup_s", self.startup_s
        return (
            (f"watchdog.{stage}_s", by_stage[stage])
            if stage in by_stage
            else ("watchdog.other_s", self.other_s)
        )
