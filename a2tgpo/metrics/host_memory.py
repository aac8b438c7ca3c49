"""Measure and reduce the host memory that this process occupies."""

import ctypes
import os
from pathlib import Path

_C_LIBRARY = ctypes.CDLL(None)


def resident_bytes() -> int:
    """Return this process's resident memory in bytes, including pages that it shares with other processes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Give freed memory back to the system, because glibc's allocator would keep it.

    On its own, glibc returns only the memory at the end of its heap. The pages of a step's freed tensors would stay
    resident, and every step would add more such pages.
    """
    _C_LIBRARY.malloc_trim(0)
