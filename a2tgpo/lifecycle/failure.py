"""Report the failure of a launched program in one line, which is printed only once for all ranks."""

import os
import signal
import sys
import time

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG, BROKEN_RUN

GRACE_S = 3.0
"""Seconds that ranks other than 0 wait before they print an error. If all ranks fail because of the same mistake,
rank 0 reports the mistake, and the launcher ends the other ranks during this wait.
"""
RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables in which torchrun, srun, Open MPI and MPICH pass a process its rank. They are set by the
launcher, so they are valid even if the process failed to join the others."""
ANOTHER_RANK_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)
"""Texts in the errors that gloo and NCCL raise because another rank has ended. That rank, or its launcher, reports
the reason."""


class ReportedByRank0(RuntimeError):
    """Raised on all ranks after rank 0 has printed a failure; they print nothing and exit with `BROKEN_RUN`."""


def report_failure(error: ConfigError | RuntimeError | OSError, *, is_ending: bool = False) -> int:
    """Print the error's message in one line, and return the program's exit code, `BAD_CONFIG` or `BROKEN_RUN`.

    If `is_ending`, this process is already stopping. It then prints nothing about an error that only says that
    another rank has ended.

    If a RuntimeError's message has several lines, a library has raised the error. It is then raised again, because
    its traceback says more than its message.
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher sends SIGTERM to end the other ranks
    if rank != "0" or is_echo:
        time.sleep(GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return BAD_CONFIG if isinstance(error, ConfigError) else BROKEN_RUN
