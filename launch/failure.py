"""What a launched program says when it fails: one line, once."""

import os
import signal
import sys
import time

from a2tgpo.config.check import ConfigError

DOES_NOT_FIT = 1
"""Exit code of a dry run whose plan does not fit the cards."""
BAD_CONFIG = 2
BROKEN_RUN = 3
"""Exit code of a run that failed, or that its guards stopped."""
GRACE_S = 3.0
"""All ranks fail on the same mistake; the others leave rank 0 this long to say it, and the launcher to end them."""
RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""torchrun's, srun's, Open MPI's and MPICH's: the launcher's own hold where joining it has failed."""
ANOTHER_RANK_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)
"""What gloo and NCCL say where a rank has ended: an echo of a failure that is told elsewhere."""


class ToldByRank0(RuntimeError):
    """A failure that rank 0 has printed for all: the ranks end with `BROKEN_RUN`, and say nothing more."""


def exit_code(error: ConfigError | RuntimeError | OSError, *, is_ending: bool = False) -> int:
    """Print the error's line and return the program's exit code: `BAD_CONFIG` or `BROKEN_RUN`.

    With `is_ending` this process has been told to end already, and what another rank's end broke is not told again.

    A RuntimeError of several lines is not one of this program's own and is raised again: its traceback is worth
    more than its message.
    """
    if isinstance(error, ToldByRank0):
        return BROKEN_RUN
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), "0")
    is_echo = any(text in str(error) for text in ANOTHER_RANK_IS_GONE)
    if isinstance(error, RuntimeError) and "\n" in str(error) and not is_echo:
        raise error
    if is_echo:
        message = "another rank has ended; its own message, or its launcher's, tells why"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename or 'a file'}: {error.strerror}"
    else:
        message = str(error)
    if is_echo and is_ending:
        return BROKEN_RUN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends the others
    if rank != "0" or is_echo:
        time.sleep(GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return BAD_CONFIG if isinstance(error, ConfigError) else BROKEN_RUN
