"""What this process holds on to: found by counting, where resident memory shows pages that come and go."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import torch

_NAMES = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h: `uordblks` bytes are allocated in the arenas, `hblkhd` outside of them."""

    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


def held() -> dict[str, int]:
    """Counts that stay where they are if nothing is kept, after a collection of garbage:

    python_blocks: small objects of Python
    tensors: those that Python knows
    bytes: what is allocated through malloc (glibc >= 2.33), tensors and large objects of Python included
    files: open file descriptors
    """
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return {
        "python_blocks": sys.getallocatedblocks(),
        "tensors": sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()),
        "bytes": info.uordblks + info.hblkhd,
        "files": len(os.listdir("/proc/self/fd")),
    }
