"""Exit codes of the tools that write into an --out folder."""

from __future__ import annotations

import sys
from collections.abc import Callable

from a2tgpo.io.errors import ConfigError


def exit_code(write: Callable[[], object]) -> int:
    """Return 0 once `write` is done; 2, after one line on stderr, if the user made a mistake or a write failed."""
    try:
        write()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename or "to --out"
        print(
            f"error: cannot write {place} ({error.strerror or error}); choose another --out", file=sys.stderr
        )
        return 2
    return 0
