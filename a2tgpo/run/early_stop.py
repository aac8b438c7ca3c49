"""Stop a run before its last step. Before the last save, undo the rollout of an unfinished step."""

from __future__ import annotations

from collections.abc import Mapping

from a2tgpo.collect.state import RolloutSnapshot, RolloutState
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.parallel.rng import get_rng_state, set_rng_state
from a2tgpo.run.checkpoints import RunCheckpoints


class EarlyStop:
    """Decides whether the run must stop, because a stop is requested or the job ends soon.

    Args:
        request: reports a requested stop and the end of the job.
        state: the state that a rollout changes.
        outage: measures how long this rank's engine waits for a service that is down. These waits are subtracted from
            the duration of a rollout, because the next rollout may have no such waits.
        checkpoints: measures how long a save takes.
    """

    def __init__(
        self, request: StopRequest, state: RolloutState, outage: Outage, checkpoints: RunCheckpoints
    ):
        self.request = request
        self._state = state
        self._outage = outage
        self._checkpoints = checkpoints
        self._longest: dict[str, float] = {}
        self._before_step: tuple[RolloutSnapshot, dict] | None = None
        self._outage_before_s = 0.0

    def should_stop(self, *stages: str) -> bool:
        """Return whether a stop is requested, or the job may end before `stages` and a save are done."""
        needed_s = sum(self._longest.get(f"time/{stage}_s", 0.0) for stage in stages)
        return self.request.should_stop(needed_s=needed_s + self._checkpoints.longest_save_s)

    def agree(self, is_stopping: bool) -> None:
        """Raise StopAgreed on all ranks if `is_stopping` is True on any rank. Every rank must call this."""
        self.request.agree(is_stopping)

    def agree_before(self, *stages: str, is_interrupted: bool = False) -> None:
        """Raise StopAgreed on all ranks if any rank should stop before `stages` or has an interrupted rollout.

        Every rank must call this.
        """
        self.request.agree(is_interrupted or self.should_stop(*stages))

    def begin_step(self) -> None:
        """Before a step, store a copy of the state that its rollout will change, for `rewind`."""
        self._before_step = self._state.snapshot(), get_rng_state()
        self._outage_before_s = self._outage.total_s

    def finish_step(self, seconds: Mapping[str, float]) -> None:
        """Record that the step is done and how long its stages took.

        Args:
            seconds: maps `time/STAGE_s` to the duration of each stage, seconds.
        """
        self._before_step = None
        waited_s = self._outage.total_s - self._outage_before_s
        for name, value in seconds.items():
            own_s = value - waited_s if name == "time/rollout_s" else value
            self._longest[name] = max(own_s, self._longest.get(name, 0.0))

    def rewind(self) -> None:
        """If a step is unfinished, restore the state and the random generators to what they were before the step."""
        if self._before_step is not None:
            snapshot, rng = self._before_step
            self._state.restore(snapshot)
            set_rng_state(rng)
