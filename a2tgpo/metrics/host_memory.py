"""How much of the machine's memory this process holds."""

import os
from pathlib import Path


def host_memory_gib() -> float:
    """Resident memory of this process, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
