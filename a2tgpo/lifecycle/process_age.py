"""The time since the start of this process."""

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """Return the seconds since the operating system started this process, interpreter start included (Linux)."""
    # Field 22 is the start time in ticks after boot; field 2, a name, may contain anything but ends at the last ")".
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
