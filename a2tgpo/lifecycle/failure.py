"""Report the failure of a launched program in one line, once for all ranks."""

import os
import signal
import sys
import time

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG, BROKEN_RUN

GRACE_S = 3.0
"""Seconds that ranks other than 0 wait before they print an error. If all ranks fail for the same reason, rank 0
prints the error, and the launcher ends the other ranks during this wait."""
RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables with which torchrun, srun, Open MPI and MPICH tell a process its rank."""
ANOTHER_RANK_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)
"""Texts in the errors that gloo and NCCL raise because another rank has ended."""


class ReportedByRank0(RuntimeError):
    """Raised on all ranks after rank 0 has printed a failure. The ranks exit with `BROKEN_RUN` and print nothing."""


def report_failure(error: ConfigError | RuntimeError | OSError, *, is_ending: bool = False) -> int:
    """Print the error's message in one line, and return the program's exit code, `BAD_CONFIG` or `BROKEN_RUN`.

    If `is_ending` (this process is already stopping), an error that another rank's end has caused is not printed.
    A RuntimeError whose message has several lines is from a library, so it is raised again to show its traceback.
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # let the launcher end this rank
    if rank != "0" or is_echo:
        time.sleep(GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return BAD_CONFIG if isinstance(error, ConfigError) else BROKEN_RUN
