"""If a job hangs, end it soon, and report the cause and the stacks of all ranks.

On every rank, a thread writes the rank's stage to the rendezvous store and checks how long the stage has lasted. The
first rank past its deadline prints one line that names the ranks that are behind. All ranks then append their stacks
to `stacks/rank_R.txt` and exit with `BROKEN_RUN`.

While a rank waits for a tool's service (`Outage`), the clocks of all ranks stop, because other ranks may wait for
that rank.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.watchdog import WatchdogConfig
from a2tgpo.io.exit_codes import BROKEN_RUN
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.side_store import side_store

POLL_S = 1.0
GRACE_S = 10.0
"""Seconds that a rank waits for the other ranks to write their stacks."""
BACKSTOP_S = 30.0
"""If a call blocks all Python threads, a C thread ends this rank this many seconds after the deadline."""
BETWEEN = "between stages"
STEADY = ("rollout", "evaluation", "score", "update")
"""Stages that take a similar time in every step. The limit of each stage depends on its longest duration so far."""
WAITING = ("refit", "exchange", "advantage")
"""Stages in which a rank may wait for the slowest rank. Their limit depends on the longest duration of any stage in
`STEADY`."""


@dataclass(frozen=True)
class Place:
    """A rank's current stage, and the number of stages before it. All ranks have the same sequence of stages."""

    number: int
    stage: str
    since: float
    """Time at which the rank entered the stage, as a value of time.monotonic()."""


class Watchdog:
    """Watches the stages of this rank. Every rank has an instance.

    Args:
        config: the section `watchdog`.
        folder: the run's folder `stacks/`. If the job hangs, each rank writes a file in it.
        outage: the record of this rank's waits for a tool's service.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        outage: Outage | None = None,
    ):
        self._config = config
        self._path = folder / f"rank_{rank}.txt"
        self._rank = rank
        self._world_size = world_size
        self._outage = outage
        self._outages_seen = 0
        """The store's counter `outages` at this rank's last poll. While a rank waits for a service, it adds 1 to
        the counter at every poll."""
        self._looked_at = time.monotonic()
        self._paused = (0, 0.0)
        """Number of a `Place`, and the seconds in this place during which outages stopped the clock."""
        self._arming = threading.Lock()
        self._place = Place(0, BETWEEN, time.monotonic())
        self._longest: dict[str, float] = {}
        """Longest duration so far, in seconds, of each stage that this rank has completed."""
        self._published = -1
        """Number of the place that this rank last wrote to the store."""
        self._closed = threading.Event()
        self._store = side_store("watchdog", timeout_s=GRACE_S)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        self.enter(BETWEEN)

    def enter(self, stage: str) -> None:
        """Record that this rank enters `stage`. "" means the time between two stages."""
        stage = stage or BETWEEN
        with self._arming:
            now, left = time.monotonic(), self._place
            taken_s = now - left.since - self._paused_s(left)
            self._longest[left.stage] = max(self._longest.get(left.stage, 0.0), taken_s)
            self._place = Place(left.number + 1, stage, now)
            self._arm(self._place)

    def follow(self, outage: Outage) -> None:
        """From now on, stop the clock while `outage` says that this rank waits for a service."""
        self._outage = outage

    def close(self) -> None:
        """Stop watching, and remove this rank's file of stacks if it is empty."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def _run(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                self._look()
            except RuntimeError:  # the process that holds the store has ended, but the deadline still applies
                place = self._place
                if self._overdue(place):
                    self._end(self._verdict(place, {}))

    def _look(self) -> None:
        self._pause_in_outages()
        place = self._place
        if place.number != self._published:
            self._store.set(f"place_{self._rank}", f"{place.number} {place.stage}")
            self._published = place.number
        if self._store.check(["verdict"]):
            self._end(None)
        elif self._overdue(place) and self._store.add("claims", 1) == 1:
            verdict = self._verdict(place, self._places())
            self._store.set("verdict", verdict)
            self._end(verdict)

    def _pause_in_outages(self) -> None:
        """Exclude the time since the last poll from the deadline if a rank has waited for a service in this time."""
        if self._outage is not None and self._outage.is_on:
            self._store.add("outages", 1)
        now, seen = time.monotonic(), self._store.add("outages", 0)
        elapsed_s, self._looked_at = now - self._looked_at, now
        if seen == self._outages_seen:
            return
        self._outages_seen = seen
        with self._arming:
            place = self._place
            self._paused = place.number, self._paused_s(place) + min(elapsed_s, now - place.since)
            self._arm(place)

    def _arm(self, place: Place) -> None:
        """Let the C thread end this rank `BACKSTOP_S` seconds after the place's deadline."""
        left_s = self._left_s(place)
        if left_s is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(max(left_s, 0) + BACKSTOP_S, exit=True, file=self._file)

    def _paused_s(self, place: Place) -> float:
        return self._paused[1] if self._paused[0] == place.number else 0.0

    def _left_s(self, place: Place) -> float | None:
        """Return the seconds left until the deadline of `place`, or None if its stage has no deadline."""
        _, deadline_s = self._deadline(place.stage)
        if not deadline_s:
            return None
        return place.since + self._paused_s(place) + deadline_s - time.monotonic()

    def _deadline(self, stage: str) -> tuple[str, float]:
        """Return a text that names the limit of `stage`; and this limit in seconds (0: no limit)."""
        key, limit_s = self._config.deadline(stage)
        known = STEADY if stage in WAITING else (stage,) if stage in STEADY else ()
        longest_s = max((self._longest.get(name, 0.0) for name in known), default=0.0)
        # Before its first whole step, this rank cannot know how long it may have to wait for other ranks.
        is_known = longest_s > 0 and (stage in STEADY or "update" in self._longest)
        allowed_s = max(self._config.min_s, self._config.slack * longest_s)
        if limit_s and self._config.slack and is_known and allowed_s < limit_s:
            return f"{allowed_s:g} s by watchdog.slack and min_s; longest so far {longest_s:.0f} s", allowed_s
        return f"{key}={limit_s:g}", limit_s

    def _overdue(self, place: Place) -> bool:
        left_s = self._left_s(place)
        return left_s is not None and left_s < 0

    def _places(self) -> dict[int, tuple[int, str]]:
        """Return the place number and the stage that each rank has written to the store."""
        found = {}
        for rank in range(self._world_size):
            if self._store.check([f"place_{rank}"]):
                number, _, stage = self._store.get(f"place_{rank}").decode().partition(" ")
                found[rank] = int(number), stage
        return found

    def _verdict(self, place: Place, places: dict[int, tuple[int, str]]) -> str:
        taken_s = time.monotonic() - place.since - self._paused_s(place)
        behind = {rank: stage for rank, (number, stage) in places.items() if number < place.number}
        limit, _ = self._deadline(place.stage)
        if behind:
            ranks = ", ".join(f"rank {rank} (still in {stage})" for rank, stage in sorted(behind.items())[:8])
            cause = f"not arrived: {ranks}" + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
        elif not places:
            cause = "the store of the ranks does not answer"
        else:
            cause = "all ranks have reached it"
        return (
            f"watchdog: {place.stage} has taken {taken_s:.0f} s on rank {self._rank} "
            f"({limit}); {cause}. Stacks of all ranks: {self._path.parent}"
        )

    def _end(self, verdict: str | None) -> None:
        """Write the stacks, wait for the other ranks to write their stacks, and end this process."""
        if verdict is not None:
            print(f"error: {verdict}", file=sys.stderr, flush=True)
            print(verdict, file=self._file, flush=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{now}: rank {self._rank} is in {self._place.stage}", file=self._file, flush=True)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        deadline = time.monotonic() + GRACE_S
        try:
            self._store.add("dumped", 1)
            while self._store.add("dumped", 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.2)
        except RuntimeError:
            pass
        os._exit(BROKEN_RUN)
