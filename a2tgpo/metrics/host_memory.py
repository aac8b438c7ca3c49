"""The machine's memory that this process holds."""

import ctypes
import os
from pathlib import Path

_C_LIBRARY = ctypes.CDLL(None)


def resident_bytes() -> int:
    """Resident memory of this process, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Give the system back what this process has freed and glibc's allocator keeps for later allocations.

    On its own, glibc returns free memory only from the end of its heap. A step's tensors are allocated among blocks
    that stay, so the freed pages between those blocks would remain resident, and more of them after every step.
    """
    _C_LIBRARY.malloc_trim(0)
