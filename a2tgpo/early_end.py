"""How a run ends before its last step: where it may, and what it leaves for the start that goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from a2tgpo.parallel.rng import get_rng_state, set_rng_state
from a2tgpo.parallel.stop_request import StopRequest

if TYPE_CHECKING:
    from a2tgpo.assemble import RunParts
    from a2tgpo.carried_pool import Carried
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.run_folder import RunFolder


class EarlyEnd:
    """Holds a stop that is asked for, and the job's end, against what the next stages and a save will take.

    Args:
        request: whether the run is to end.
        parts: what the run is made of; sampler, carried groups and generators are put back before the last save.
        folder: keeps the checkpoints.
        guards: saved with them.
    """

    def __init__(self, request: StopRequest, parts: RunParts, folder: RunFolder, guards: Guards):
        self.request = request
        self._parts = parts
        self._folder = folder
        self._guards = guards
        self._longest: dict[str, float] = {}
        self._before_step: tuple[dict, Carried, dict] | None = None
        self._outage_before_s = 0.0

    def is_near(self, *stages: str) -> bool:
        """Whether this rank knows of a stop, or the job may end before `stages` and a save are over."""
        needed_s = sum(self._longest.get(f"time/{stage}_s", 0.0) for stage in stages)
        return self.request.is_asked(needed_s=needed_s + self._folder.longest_save_s)

    def agree_before(self, *stages: str, is_broken_off: bool = False) -> None:
        """Raise StopAgreed on all ranks if `is_near` on any, or a rollout was broken off; all ranks call this."""
        self.request.agree(is_broken_off or self.is_near(*stages))

    def begin_step(self) -> None:
        """Remember what a step uses up before its update."""
        self._before_step = self._parts.sampler.state_dict(), self._parts.carried.state, get_rng_state()
        self._outage_before_s = self._parts.rollout.outage.total_s

    def finish_step(self, seconds: Mapping[str, float]) -> None:
        """The step is done; `seconds` of its stages, as `time/STAGE_s`."""
        self._before_step = None
        waited_s = self._parts.rollout.outage.total_s - self._outage_before_s
        for name, value in seconds.items():
            # What a rollout waited for a service says nothing of how long the next one takes.
            own_s = value - waited_s if name == "time/rollout_s" else value
            self._longest[name] = max(own_s, self._longest.get(name, 0.0))

    def save(self, step: int, *, evaluation_is_due: bool) -> None:
        """Leave a checkpoint of `step`, the last one done, as it was before anything after it; all ranks."""
        if self._before_step is not None:
            sampler, carried, rng = self._before_step
            self._parts.sampler.load_state_dict(sampler)
            self._parts.carried.state = carried
            set_rng_state(rng)
        self._folder.finish_saving(is_last=False)
        if self._folder.saved_step != step:
            self._folder.save(step, self._parts, self._guards, evaluation_is_due=evaluation_is_due)
        self._folder.finish_saving()
