"""The state that changes with each rollout. A run must restore this state after a stop or a crash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from a2tgpo.collect.carried_pool import Carried
from a2tgpo.data.sampler import PromptSampler


@dataclass(frozen=True, kw_only=True)
class RolloutSnapshot:
    """A `RolloutState` at one moment."""

    sampler: dict[str, Any]
    """The result of `PromptSampler.state_dict`."""
    carried: Carried


@dataclass(kw_only=True)
class RolloutState:
    """The sampler of the questions, and the groups that continue in the next step if `rollout.partial` is on."""

    sampler: PromptSampler
    carried: Carried = field(default_factory=Carried)

    def snapshot(self) -> RolloutSnapshot:
        return RolloutSnapshot(sampler=self.sampler.state_dict(), carried=self.carried)

    def restore(self, snapshot: RolloutSnapshot) -> None:
        self.sampler.load_state_dict(snapshot.sampler)
        self.carried = snapshot.carried
