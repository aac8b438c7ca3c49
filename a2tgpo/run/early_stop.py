"""End a run before its last step: decide when to stop, and save a checkpoint from which the run can resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.parallel.rng import get_rng_state, set_rng_state

if TYPE_CHECKING:
    from a2tgpo.assemble import RunParts
    from a2tgpo.collect.carried_pool import Carried
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.run.folder import RunFolder


class EarlyEnd:
    """Decides whether to stop now: a stop is requested, or the job ends too soon for the next stages and a save.

    Args:
        request: reports a requested stop and the job's end.
        parts: of the run; sampler, carried groups and random generators are restored before the last save.
        folder: saves the checkpoints.
        guards: saved with each checkpoint.
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
        """Return whether this rank knows of a stop, or the job may end before `stages` and a save are done."""
        needed_s = sum(self._longest.get(f"time/{stage}_s", 0.0) for stage in stages)
        return self.request.is_requested(needed_s=needed_s + self._folder.longest_save_s)

    def agree_before(self, *stages: str, is_broken_off: bool = False) -> None:
        """Raise StopAgreed on all ranks if `is_near` on any, or a rollout was interrupted; all ranks call this."""
        self.request.agree(is_broken_off or self.is_near(*stages))

    def begin_step(self) -> None:
        """Store the state that a step will change before its update."""
        self._before_step = self._parts.sampler.state_dict(), self._parts.carried.state, get_rng_state()
        self._outage_before_s = self._parts.rollout.outage.total_s

    def finish_step(self, seconds: Mapping[str, float]) -> None:
        """Record that the step is done, with the `seconds` of its stages as `time/STAGE_s`."""
        self._before_step = None
        waited_s = self._parts.rollout.outage.total_s - self._outage_before_s
        for name, value in seconds.items():
            # Time that a rollout waited for a service does not predict the next rollout's duration.
            own_s = value - waited_s if name == "time/rollout_s" else value
            self._longest[name] = max(own_s, self._longest.get(name, 0.0))

    def save(self, step: int, *, evaluation_is_due: bool) -> None:
        """Save a checkpoint of the last finished step `step`, with the state right after it; every rank must call
        this.
        """
        if self._before_step is not None:
            sampler, carried, rng = self._before_step
            self._parts.sampler.load_state_dict(sampler)
            self._parts.carried.state = carried
            set_rng_state(rng)
        self._folder.finish_saving(is_last=False)
        if self._folder.saved_step != step:
            self._folder.save(step, self._parts, self._guards, evaluation_is_due=evaluation_is_due)
        self._folder.finish_saving()
