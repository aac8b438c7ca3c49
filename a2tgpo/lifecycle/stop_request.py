"""Stopping a run early so that the next start continues it: one rank requests the stop, all ranks agree on it.

A signal, the approaching end of the job or too long an outage makes a rank request the stop. The request reaches the
other ranks through the rendezvous store, which long stages poll; they then interrupt their work. All ranks then call
`agree`, at a point where no work is half done.
"""

from __future__ import annotations

import contextlib
import time

import torch

from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.side_store import side_store
from a2tgpo.lifecycle.stop_signal import END_TIME, StopSignal, job_deadline
from a2tgpo.parallel.collectives import all_reduce_max, world_group

LOOK_S = 1.0
"""Time between two reads of the store."""
STORE_TIMEOUT_S = 10.0
_REASON = "reason"


class StopAgreed(Exception):
    """Raised on all ranks at the same point. Not an error: the run must save and end."""


class StopRequest:
    """This rank's view of whether the run must save and end; every rank has one.

    Args:
        signal: receives this process's signals; None: ignore signals and the end of the job.
        margin_s: time to keep free before the end of the job, in addition to the time for saving.
        outage: this rank's outage; None: no outage ends the run.
    """

    def __init__(
        self, signal: StopSignal | None = None, *, margin_s: float = 0.0, outage: Outage | None = None
    ):
        self.reason = ""
        """Why the run must stop, in a few words; empty: this rank knows of no request."""
        self.is_agreed = False
        """Whether `agree` has raised."""
        self._signal = signal
        self._margin_s = margin_s
        self._outage = outage
        self._deadline = job_deadline() if signal else None
        self._store = side_store("stop", timeout_s=STORE_TIMEOUT_S)
        self._looked = -LOOK_S

    def should_stop(self, *, needed_s: float = 0.0) -> bool:
        """Whether this rank knows of a stop request, or less than `needed_s` plus the margin is left of the job.

        Runs no collective and is cheap enough for every pass of a loop. Ranks learn of a request at different times.
        """
        if not self.reason:
            self.reason = self._own_reason(needed_s)
            if self.reason:
                # Fails if the rank that holds the store is gone, which is reported elsewhere.
                with contextlib.suppress(RuntimeError):
                    self._store.set(_REASON, self.reason)
            elif self._looked + LOOK_S <= time.monotonic():
                self._looked = time.monotonic()
                self.reason = self._published_reason()
        return bool(self.reason)

    def agree(self, is_stopping: bool) -> None:
        """Raise `StopAgreed` on all ranks if `is_stopping` on any; every rank of the world must call this."""
        if all_reduce_max(torch.tensor(float(is_stopping)), world_group()).item():
            self.reason = self.reason or self._published_reason() or "another rank received a stop request"
            self.is_agreed = True
            raise StopAgreed(self.reason)

    def _own_reason(self, needed_s: float) -> str:
        if self._signal is not None and self._signal.name:
            return self._signal.name
        if self._outage is not None and (verdict := self._outage.verdict):
            return verdict
        if self._deadline is None:
            return ""
        left_s = self._deadline - time.monotonic()
        if left_s >= needed_s + self._margin_s:
            return ""
        return f"the job ends in {left_s:.0f} s ({END_TIME})"

    def _published_reason(self) -> str:
        """Return the reason of a rank that requested the stop; empty if none did."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_REASON]):
                return str(self._store.get(_REASON).decode())
        return ""
