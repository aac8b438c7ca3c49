"""Measure the time since this process started."""

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """Return the seconds since the operating system started this process. Works only on Linux."""
    # Field 22 is the start time in ticks after boot. Field 2 is a name in parentheses that may itself contain ")".
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
