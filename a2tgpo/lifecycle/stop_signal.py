"""Detect that a signal or the job's time limit requires this process to end. This module does not import torch.

SIGTERM and SIGUSR1 request that the run save and exit with `START_AGAIN`. If a signal arrives before training has
begun, the process ends at once. If it arrives during training, it is recorded until all ranks have agreed to stop
(`lifecycle/stop_request.py`). A scheduler may send several signals. Signals after the first are ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import START_AGAIN

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_TIME = "SLURM_JOB_END_TIME"
"""Environment variable with the time of the job's end in seconds since 1970. Slurm sets this variable. Users of other
schedulers may set it."""


class StopSignal:
    """Records the first of `SIGNALS` that this process receives. Create one instance, in the main thread."""

    def __init__(self) -> None:
        self.name = ""
        """Name of the first signal. Empty if there was none."""
        self.kept = ""
        """A few words about what earlier starts of the run have saved. They are printed if a signal ends the process
        at once."""
        self._is_noted_only = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def begin_training(self) -> None:
        """From now on, record a signal without ending the process."""
        self._is_noted_only = True

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if not self._is_noted_only:
            if os.environ.get("RANK", "0") == "0":
                kept = f"; {self.kept}" if self.kept else ""
                print(
                    f"stopped before there was anything new to save: {self.name}{kept}",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(START_AGAIN)


def job_deadline() -> float | None:
    """Return the time at which the job ends, as a value of time.monotonic(), or None if it is unknown.

    Raises:
        ConfigError: with a one-line message, if the environment variable `END_TIME` is not a number of seconds.
    """
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{END_TIME} is {text!r}; allowed: seconds since 1970, as `date +%s` prints")
    return time.monotonic() + int(text) - time.time()
