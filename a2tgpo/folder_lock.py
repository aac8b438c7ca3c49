"""One run at a time in a folder: who holds it is written in it, and shows that it lives by writing again and again.

Locks of the file system are not used: Lustre is often mounted without them, NFS keeps those of a node that crashed,
and a forked child keeps flock's of a parent that has died. `holder.json` works wherever files do. Whether its holder
lives is known at once on the same machine (process and start time), and where Slurm has requeued the holder's own
job, which it does when the job has ended. Elsewhere the next start watches whether the file still changes. It
compares what it reads, never clocks; reading opens the file anew, which is when NFS looks at the server.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.check import ConfigError

logger = logging.getLogger(__name__)

FILE = "holder.json"
BEAT_S = 5.0
"""Between two signs of life."""
SILENCE_S = 45.0
"""Without a sign of life so long, a holder on another machine is taken to be dead."""
SETTLE_S = 1.0
"""Two starts may find the same dead holder; after this long both read who of them is written there."""
BROKEN_RUN = 3
"""Exit code of a process whose folder another one has taken, as launch.failure's."""
_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, named so that no other is taken for it."""

    host: str
    pid: int
    started: int
    """Of the process, in ticks after boot: numbers of processes come round."""
    boot: str
    """Of the machine and its namespace of processes: only within one can a pid be looked at."""
    slurm_job: str = ""
    slurm_restarts: int = 0
    since: float = 0.0
    """Seconds since the epoch; for people only."""

    @property
    def identity(self) -> tuple[str, int, int]:
        return self.boot, self.pid, self.started

    def describe(self) -> str:
        """Who it is and since when, in a few words."""
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        minutes = max(0, round((time.time() - self.since) / 60))
        return f"process {self.pid} on {self.host}{job}, which has held it for {minutes} min"


def this_process() -> Holder:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return Holder(
        host=platform.node(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        boot=f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}",
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
        since=time.time(),
    )


class FolderLock:
    """Holds a folder for this process until it ends or `release` is called; one rank of a run has one.

    Args:
        folder: of the run; exists.
        key: the setting that names it, for the message.

    Raises:
        ConfigError: one line that names the process which holds the folder.
    """

    def __init__(self, folder: Path, *, key: str = "run.name"):
        self._path = folder / FILE
        self._me = this_process()
        self._released = threading.Event()
        self._count = 0
        other = self._take()
        if other is not None:
            raise ConfigError(
                f"{key}: {folder} is in use by {other.describe()}; end that run first, or choose another {key}"
            )
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder back; it may have been moved or removed meanwhile."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if _is(self._me, _read(self._path)):
                self._path.unlink()

    def _take(self) -> Holder | None:
        """Write this process in, unless another one lives: that one."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            other = _read(self._path)
            if other is None:  # another start may be about to write itself in
                time.sleep(SETTLE_S)
                other = _read(self._path)
            if other is not None and not _is(self._me, other) and _lives(self._path, other, self._me):
                return other
            self._write()
            if other is None or not _is(self._me, other):
                time.sleep(SETTLE_S)
        else:
            os.close(descriptor)
            self._write()
        found = _read(self._path)
        return None if found is None or _is(self._me, found) else found

    def _write(self) -> None:
        # In place and of one length: a reader that opens the file sees one beat or the next.
        text = json.dumps({**dataclasses.asdict(self._me), "beat": self._count})
        with open(self._path, "r+b" if self._path.exists() else "wb") as stream:
            stream.write(text.encode().ljust(_WIDTH) + b"\n")
        self._count += 1

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                found = _read(self._path)
                if found is not None and not _is(self._me, found):
                    print(
                        f"error: {self._path.parent} was taken over by process {found.pid} on {found.host}, "
                        f"which saw no sign of life from this one for {SILENCE_S:.0f} s; this one ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(BROKEN_RUN)
                self._write()
            except OSError:  # a file system that is away comes back, or ends the run elsewhere
                continue


def _lives(path: Path, other: Holder, me: Holder) -> bool:
    if other.boot == me.boot:
        return _started(other.pid) == other.started
    if me.slurm_job and other.slurm_job == me.slurm_job and other.slurm_restarts < me.slurm_restarts:
        return False
    logger.warning(
        "%s is in use by %s, or was when that one died; waiting %.0f s for a sign of life",
        path.parent,
        other.describe(),
        SILENCE_S,
    )
    return _changes(path)


def _changes(path: Path) -> bool:
    """Whether the file changes within `SILENCE_S`, not counting time in which the file system did not answer."""
    first, silent_s = _content(path), 0.0
    pause_s = min(BEAT_S, SILENCE_S / 4)
    while silent_s < SILENCE_S:
        time.sleep(pause_s)
        begin = time.monotonic()
        if _content(path) != first:
            return True
        silent_s = silent_s + pause_s if time.monotonic() - begin < pause_s else 0.0
    return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _read(path: Path) -> Holder | None:
    """Who is written there; None: nobody, or it cannot be read."""
    try:
        record = json.loads(_content(path))
        del record["beat"]
        return Holder(**record)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is(one: Holder, other: Holder | None) -> bool:
    return other is not None and one.identity == other.identity


def _started(pid: int) -> int | None:
    """Ticks after boot at which the process was started; None: there is none, or it waits to be buried."""
    try:
        # The second field is a name that may hold anything but ends in the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
