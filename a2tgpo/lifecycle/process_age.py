"""How long ago this process was started."""

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """Seconds since the operating system started this process, the interpreter's own start included (Linux)."""
    # The 22nd field, ticks after boot; the second one is a name that may hold anything but ends in the last ")".
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
