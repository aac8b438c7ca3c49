"""What this process is told about its own end, by a signal or by the job's time limit; without torch.

SIGTERM and SIGUSR1 ask the run to save and end with `EXIT_CODE`. Before training there is nothing to save: the
process ends at once. While it trains the signal is noted, and obeyed where all ranks agree to
(`parallel/stop_request.py`). Further signals then change nothing: schedulers send several, and each means the same.
SIGKILL and Ctrl-C end at once, as ever.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from a2tgpo.config.check import ConfigError

EXIT_CODE = 75
"""Saved, to be started again: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_TIME = "SLURM_JOB_END_TIME"
"""Environment variable: when the job ends, seconds since 1970. Slurm sets it; by hand it serves other schedulers."""


class StopSignal:
    """Notes the first of `SIGNALS` that this process gets; one per process, made by its main thread."""

    def __init__(self) -> None:
        self.name = ""
        """Of the signal; empty: none came."""
        self.kept = ""
        """What earlier starts have kept, in a few words: told where a signal ends the process at once."""
        self._is_noted_only = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def begin_training(self) -> None:
        """From now on a signal is noted and does not end the process."""
        self._is_noted_only = True

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if not self._is_noted_only:
            if os.environ.get("RANK", "0") == "0":
                kept = f"; {self.kept}" if self.kept else ""
                print(
                    f"stopped before there was anything new to keep: {self.name}{kept}",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(EXIT_CODE)


def job_deadline() -> float | None:
    """When the job ends, on the clock of time.monotonic(); None: nobody says.

    Raises:
        ConfigError: if the variable `END_TIME` holds something else.
    """
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{END_TIME} is {text!r}; allowed: seconds since 1970, as `date +%s` prints")
    return time.monotonic() + int(text) - time.time()
