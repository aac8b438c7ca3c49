"""Report a launched program's failure: one line, once."""

import os
import signal
import sys
import time

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG, BROKEN_RUN

GRACE_S = 3.0
"""If all ranks fail on the same mistake, the other ranks wait this long, so that rank 0 can report the mistake and
the launcher can end them.
"""
RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Ranks as named by torchrun, srun, Open MPI and MPICH: the launcher's names are valid even if joining failed."""
ANOTHER_RANK_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)
"""Messages of gloo and NCCL after another rank has ended, whose own failure is reported elsewhere."""


class ReportedByRank0(RuntimeError):
    """A failure that rank 0 has printed for all ranks: they exit with `BROKEN_RUN` and print nothing more."""


def report_failure(error: ConfigError | RuntimeError | OSError, *, is_ending: bool = False) -> int:
    """Print the error's line and return the program's exit code: `BAD_CONFIG` or `BROKEN_RUN`.

    If `is_ending`, this process is already stopping, so errors caused only by another rank's exit are suppressed.

    A RuntimeError with several lines is not from this program and is raised again: its traceback is worth more than
    its message.
    """
    if isinstance(error, ReportedByRank0):
        return BROKEN_RUN
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), "0")
    is_echo = any(text in str(error) for text in ANOTHER_RANK_IS_GONE)
    if isinstance(error, RuntimeError) and "\n" in str(error) and not is_echo:
        raise error
    if is_echo:
        message = "another rank has ended; its own message, or its launcher's, gives the reason"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename or 'a file'}: {error.strerror}"
    else:
        message = str(error)
    if is_echo and is_ending:
        return BROKEN_RUN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's signal to end the other ranks
    if rank != "0" or is_echo:
        time.sleep(GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return BAD_CONFIG if isinstance(error, ConfigError) else BROKEN_RUN
