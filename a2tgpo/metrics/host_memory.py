"""Measure and reduce the host memory that this process occupies."""

import ctypes
import os
from pathlib import Path

_C_LIBRARY = ctypes.CDLL(None)


def resident_bytes() -> int:
    """Return the bytes of resident memory of this process, including pages that it shares with other processes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Give memory that has been freed, but that glibc's allocator keeps for later allocations, back to the system.

    Without this call, glibc gives back only free memory at the end of its heap. A step's tensors lie between blocks
    that live longer. After these tensors are freed, their pages would stay resident, and every step would add more
    such pages.
    """
    _C_LIBRARY.malloc_trim(0)
