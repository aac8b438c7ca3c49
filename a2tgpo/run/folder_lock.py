"""Allow only one run at a time in a folder.

The process that holds the folder writes its identity to `holder.json`, and then changes this file at regular
intervals as a sign of life. Locks of the file system are unsuitable, because Lustre is often mounted without locks,
NFS keeps the locks of a crashed node, and a forked child keeps the lock of its dead parent.

A new process may find that the folder has a holder. If the holder is on the same machine, the new process checks the
holder's process id and start time. If the holder started before its Slurm job was requeued, the holder has ended. In
all other cases the new process watches `holder.json`. If the file still changes, the holder is alive. The new process
opens the file anew for each read, because only then does NFS read the file from the server.
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

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BROKEN_RUN

logger = logging.getLogger(__name__)

FILE = "holder.json"
BEAT_S = 5.0
SILENCE_S = 45.0
"""Seconds without a sign of life after which a holder on another machine is considered dead."""
SETTLE_S = 1.0
"""Seconds that a process waits after it has replaced a dead holder, because two processes may do this at once."""
_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The identity of a process that holds a folder. No two processes have the same identity."""

    host: str
    pid: int
    started: int
    """Start time of the process, in ticks after boot. A process id alone is not unique, because ids are reused."""
    boot: str
    """Boot id and PID namespace of the process. Only a process with the same boot id and namespace can check the
    process id."""
    slurm_job: str = ""
    slurm_restarts: int = 0
    since: float = 0.0
    """Time at which the process claimed the folder, seconds since the epoch. Only messages use this time."""

    @property
    def identity(self) -> tuple[str, int, int]:
        return self.boot, self.pid, self.started

    def describe(self) -> str:
        """Return a few words that identify the process and tell how long it has held the folder."""
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
    """Holds a folder for this process until the process ends or calls `release`. Only one rank creates a lock.

    Args:
        folder: the folder of the run, which must exist.
        key: the setting that names the folder, for the error message.

    Raises:
        ConfigError: with a one-line message, if another process holds the folder.
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
        """Release the folder. If the folder has been moved or removed, do nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if _is(self._me, _read(self._path)):
                self._path.unlink()

    def _take(self) -> Holder | None:
        """Return the other holder if it is alive. Otherwise write this process as the holder, and return None."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            other = _read(self._path)
            if other is None:  # another process may be about to write its identity to the file
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
        # Always write the same number of bytes in place, so that a reader never sees old and new content mixed.
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
                        f"which saw no sign of life from this process for {SILENCE_S:.0f} s; this process ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(BROKEN_RUN)
                self._write()
            except OSError:  # if the file system stays broken, the run's other writes fail and end the run
                continue


def _lives(path: Path, other: Holder, me: Holder) -> bool:
    if other.boot == me.boot:
        return _started(other.pid) == other.started
    if me.slurm_job and other.slurm_job == me.slurm_job and other.slurm_restarts < me.slurm_restarts:
        return False
    logger.warning(
        "%s is in use by %s, unless that process died; waiting %.0f s for a sign of life",
        path.parent,
        other.describe(),
        SILENCE_S,
    )
    return _changes(path)


def _changes(path: Path) -> bool:
    """Return whether the content of the file changes within `SILENCE_S` seconds. A hanging read restarts the wait."""
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
    """Return the holder that the file names, or None if the file names none or cannot be read."""
    try:
        record = json.loads(_content(path))
        del record["beat"]
        return Holder(**record)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is(one: Holder, other: Holder | None) -> bool:
    return other is not None and one.identity == other.identity


def _started(pid: int) -> int | None:
    """Return the start time of process `pid` in ticks after boot; None if the process has ended or is a zombie."""
    try:
        # The second field is the process's name, which may contain any character and ends at the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
