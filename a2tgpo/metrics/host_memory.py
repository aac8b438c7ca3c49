"""Memory of this machine that this process occupies."""

import ctypes
import os
from pathlib import Path

_C_LIBRARY = ctypes.CDLL(None)


def resident_bytes() -> int:
    """Return the resident memory of this process, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Return freed memory, which glibc's allocator keeps for later allocations, to the system.

    Without this call, glibc returns free memory only from the end of its heap. A step's tensors are allocated among
    blocks that live longer, so the pages freed between those blocks would stay resident, and their number would grow
    with every step.
    """
    _C_LIBRARY.malloc_trim(0)
