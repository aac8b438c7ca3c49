"""Ending a run early so that the next start goes on from there: asked for on one rank, agreed on by all.

A rank is asked by a signal, by the nearing end of the job, or by an outage that has lasted too long. It tells the
others through the store in which the ranks met; long stages look there by themselves and break off. All ranks then
meet in `agree`, which is called where nothing is half done.
"""

from __future__ import annotations

import contextlib
import time

import torch
import torch.distributed as dist

from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.parallel.outage import Outage
from a2tgpo.parallel.side_store import side_store
from a2tgpo.stop_signal import END_TIME, StopSignal, job_deadline

LOOK_S = 1.0
"""Between two looks into the store."""
STORE_TIMEOUT_S = 10.0
_REASON = "reason"


class StopAgreed(Exception):
    """Raised on all ranks at the same point. No error: the run is to save and end."""


class StopRequest:
    """Whether the run is to save and end; every rank holds one.

    Args:
        signal: what this process is told; None: signals are not heard.
        margin_s: kept free before the end of the job, besides what saving takes.
        outage: of this rank; None: none ends the run.
    """

    def __init__(
        self, signal: StopSignal | None = None, *, margin_s: float = 0.0, outage: Outage | None = None
    ):
        self.reason = ""
        """Why, in a few words; empty: nobody has asked, as far as this rank knows."""
        self.is_agreed = False
        """`agree` has raised."""
        self._signal = signal
        self._margin_s = margin_s
        self._outage = outage
        self._deadline = job_deadline() if signal else None
        self._store = side_store("stop", timeout_s=STORE_TIMEOUT_S)
        self._looked = -LOOK_S

    def is_asked(self, *, needed_s: float = 0.0) -> bool:
        """Whether this rank knows that the run is to end, or must since less than `needed_s` and the margin are left.

        No collective, and cheap enough for every pass of a loop. Ranks come to know at different times.
        """
        if not self.reason:
            self.reason = self._own_reason(needed_s)
            if self.reason:
                # It fails where the rank that holds the store is gone: told elsewhere.
                with contextlib.suppress(RuntimeError):
                    self._store.set(_REASON, self.reason)
            elif self._looked + LOOK_S <= time.monotonic():
                self._looked = time.monotonic()
                self.reason = self._told()
        return bool(self.reason)

    def agree(self, is_stopping: bool) -> None:
        """Raise `StopAgreed` on all ranks if `is_stopping` on any; every rank of the world must call this."""
        world = dist.group.WORLD
        assert world is not None, "a run's processes are joined"
        if all_reduce_max(torch.tensor(float(is_stopping)), world).item():
            self.reason = self.reason or self._told() or "another rank was asked to"
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

    def _told(self) -> str:
        """The reason of a rank that was asked."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_REASON]):
                return str(self._store.get(_REASON).decode())
        return ""
