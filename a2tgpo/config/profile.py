"""Profiles of chosen training steps."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require

PHASES = ("bank", "refit", "rollout", "score", "update")
"""The memory phases of a training step (memory/residency.py)."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiles of chosen training steps, in the folder profile/ of the run (docs/profiling.md)."""

    steps: tuple[int, ...] = ()
    """Steps to profile, counted from 1. A profiled step is slower."""
    tool: Literal["torch", "nsys"] = "torch"
    """`torch`: every rank writes a trace of each step, with the operations of CPU and GPU. `nsys`: the steps are
    marked for Nsight Systems, which must have started the ranks."""
    memory: tuple[str, ...] = ()
    """Phases (bank, refit, rollout, score, update) at whose end every rank writes a snapshot of its GPU's memory, in
    the steps of `steps`."""

    def __post_init__(self) -> None:
        require(all(step >= 1 for step in self.steps), "profile.steps", list(self.steps), "steps >= 1")
        require(
            set(self.memory) <= set(PHASES), "profile.memory", list(self.memory), f"among {', '.join(PHASES)}"
        )
        require(
            bool(self.steps) or not self.memory,
            "profile.memory",
            list(self.memory),
            "[] without profile.steps, which chooses the steps of the snapshots",
        )
