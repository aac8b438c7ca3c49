"""Detect that this process must end, by a signal or by the job's time limit; without torch.

SIGTERM and SIGUSR1 request that the run save and exit with `START_AGAIN`. Before training there is nothing to save,
so the process exits at once. During training the signal is recorded, and the run stops once all ranks agree
(`lifecycle/stop_request.py`). Later signals are ignored, because schedulers send several with the same meaning.
SIGKILL and Ctrl-C end the process at once, as usual.
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
"""Environment variable with the job's end, seconds since 1970. Slurm sets this variable; for other schedulers set it
yourself.
"""


class StopSignal:
    """Records the first of `SIGNALS` that this process gets; create one per process, in its main thread."""

    def __init__(self) -> None:
        self.name = ""
        """Name of the signal; empty if none came."""
        self.kept = ""
        """What earlier starts saved, in a few words; printed when a signal ends the process at once."""
        self._is_noted_only = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def begin_training(self) -> None:
        """From now on, record a signal instead of ending the process."""
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
    """Return when the job ends, on the clock of time.monotonic(); None if unknown.

    Raises:
        ConfigError: the variable `END_TIME` does not hold seconds.
    """
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{END_TIME} is {text!r}; allowed: seconds since 1970, as `date +%s` prints")
    return time.monotonic() + int(text) - time.time()
