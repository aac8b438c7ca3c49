"""Stop a run early, so that the program can continue the run when it is started again.

A rank requests the stop after a signal, shortly before the job's end, or in a long outage, and writes the request to
the rendezvous store. During long stages, the other ranks poll the store. They interrupt their work if they find a
request. All ranks then call `agree` at a point where no work is half done.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import torch

from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.side_store import side_store
from a2tgpo.lifecycle.stop_signal import END_TIME, StopSignal, job_deadline
from a2tgpo.parallel.collectives import all_reduce_max, world_group

LOOK_S = 1.0
"""Seconds between two reads of the store."""
STORE_TIMEOUT_S = 10.0
_REASON = "reason"


class StopAgreed(Exception):
    """Raised on all ranks at the same point of the program if the run must save and end. Not an error."""


class Stop(Protocol):
    """Tells a long stage whether it must be interrupted. A `StopRequest` is one."""

    def should_stop(self) -> bool: ...

    def agree(self, is_stopping: bool) -> None: ...


class StopRequest:
    """Decides whether the run must save and end. Every rank has an instance.

    Args:
        signal: the receiver of this process's signals. None: signals and the job's end do not stop the run.
        margin_s: seconds to reserve before the job's end, in addition to the time that saving needs.
        outage: the record of this rank's waits for a service. None: no outage stops the run.
    """

    def __init__(
        self, signal: StopSignal | None = None, *, margin_s: float = 0.0, outage: Outage | None = None
    ):
        self.reason = ""
        """Why the run must stop, in a few words. Empty if this rank knows of no request."""
        self.is_agreed = False
        """Whether `agree` has raised `StopAgreed`."""
        self._signal = signal
        self._margin_s = margin_s
        self._outage = outage
        self._deadline = job_deadline() if signal else None
        self._store = side_store("stop", timeout_s=STORE_TIMEOUT_S)
        self._looked = -LOOK_S

    def should_stop(self, *, needed_s: float = 0.0) -> bool:
        """Return True if this rank knows of a request to stop, or makes a request now.

        The rank makes a request after a signal, in an outage that must end the run, or if the job ends in fewer than
        `needed_s` + `margin_s` seconds. Other ranks learn of the request later. This method runs no collective and
        is cheap enough for every pass of a loop.
        """
        if not self.reason:
            self.reason = self._own_reason(needed_s)
            if self.reason:
                # Writing fails if the rank that holds the store has ended.
                with contextlib.suppress(RuntimeError):
                    self._store.set(_REASON, self.reason)
            elif self._looked + LOOK_S <= time.monotonic():
                self._looked = time.monotonic()
                self.reason = self._published_reason()
        return bool(self.reason)

    def agree(self, is_stopping: bool) -> None:
        """Raise `StopAgreed` on all ranks if `is_stopping` is True on any rank. Every rank must call this."""
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
        """Return the reason in the store, or an empty string if no rank has made a request."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_REASON]):
                return str(self._store.get(_REASON).decode())
        return ""
