"""What a launched program says when it fails: one line, once."""

import os
import sys
import time

from a2tgpo.config.check import ConfigError

BAD_CONFIG = 2
BROKEN_RUN = 3
"""Exit code of a run that failed, or that its guards stopped."""
GRACE_S = 3.0
"""All ranks fail on the same mistake; the others leave rank 0 this long to say it, and the launcher to end them."""


def exit_code(error: ConfigError | RuntimeError) -> int:
    """Print the error's line and return the program's exit code: `BAD_CONFIG` or `BROKEN_RUN`.

    A RuntimeError of several lines is not one of this program's own and is raised again: its traceback is worth
    more than its message.
    """
    if isinstance(error, RuntimeError) and "\n" in str(error):
        raise error
    message = str(error)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(GRACE_S)
        message = f"rank {os.environ['RANK']}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return BAD_CONFIG if isinstance(error, ConfigError) else BROKEN_RUN
