"""Count the objects and bytes that this process keeps. Resident memory is less exact, because its pages come
and go.
"""

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
    """struct mallinfo2 of malloc.h: `uordblks` bytes are allocated in the arenas, and `hblkhd` bytes outside them."""

    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


def held() -> dict[str, int]:
    """Collect garbage, and return counts that do not grow if nothing is kept:

    python_blocks: small objects of Python
    tensors: tensors that Python knows
    bytes: bytes allocated through malloc (glibc >= 2.33), including tensors and large objects of Python
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
