"""Landlock rules of a sandbox process: the files that it may read, and the one folder that it may change.

The launcher runs this file without the package, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Sequence

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Maps each version of Landlock to its number of access rights. Versions above 4 have at least 16."""
_CONNECT_AND_BIND, _SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3
"""Kinds of access to the network and to other processes. With Landlock 6 or later, `restrict_files` refuses them."""
_PR_SET_NO_NEW_PRIVS = 38


def has_landlock(version: int = 1) -> bool:
    """Return whether the kernel has at least this version of Landlock."""
    return _version() >= version


def restrict_files(*, readable: Sequence[str], writable: Sequence[str]) -> bool:
    """From now on, allow access only to files at or below these paths. Return False if the kernel has no Landlock.

    Paths that do not exist are skipped. From version 6 on, Landlock also refuses TCP connections, and signals to
    processes outside the sandbox.

    Raises:
        OSError: if the kernel refuses a rule.
    """
    if not has_landlock():
        return False
    every = (1 << _NUM_RIGHTS.get(_version(), 16)) - 1
    attributes = struct.pack("=Q", every)
    if _version() >= 6:
        attributes = struct.pack("=QQQ", every, _CONNECT_AND_BIND, _SIGNALS_AND_ABSTRACT_SOCKETS)
    rules = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    for paths, rights in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, every)):
        for path in filter(os.path.exists, paths):
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            possible = every if stat.S_ISDIR(os.fstat(file).st_mode) else every & _OF_A_FILE
            _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights & possible, file), 0)
            os.close(file)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(_RESTRICT_SELF, rules, 0)
    os.close(rules)
    return True


def _version() -> int:
    try:
        return _call(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _call(number: int, *arguments: bytes | int | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
