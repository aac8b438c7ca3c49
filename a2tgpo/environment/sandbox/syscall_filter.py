"""The seccomp filter of a sandbox process. Once installed, it can never be removed.

The launcher runs this file without the package, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_REFUSED = {
    "x86_64": {
        **{"execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "unshare": 272, "setns": 308},
        **{"socket": 41, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "tkill": 200},
        **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
        **{"add_key": 248, "request_key": 249, "keyctl": 250},
        **{"setpriority": 141, "ioprio_set": 251, "move_pages": 279, "migrate_pages": 256},
        **{"sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314},
        **{
            "chmod": 90,
            "fchmod": 91,
            "fchmodat": 268,
            "chown": 92,
            "fchown": 93,
            "lchown": 94,
            "fchownat": 260,
        },
        **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190},
        **{"removexattr": 197, "lremovexattr": 198, "fremovexattr": 199},
        **{"utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280},
        **{"inotify_add_watch": 254, "fanotify_init": 300},
    },
    "aarch64": {
        **{"execve": 221, "execveat": 281, "unshare": 97, "setns": 268},
        **{"socket": 198, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "tkill": 130},
        **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180},
        **{"add_key": 217, "request_key": 218, "keyctl": 219},
        **{"setpriority": 140, "ioprio_set": 30, "move_pages": 239, "migrate_pages": 238},
        **{"sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122, "sched_setattr": 274},
        **{"fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88},
        **{"setxattr": 5, "lsetxattr": 6, "fsetxattr": 7},
        **{"removexattr": 14, "lremovexattr": 15, "fremovexattr": 16},
        **{"inotify_add_watch": 27, "fanotify_init": 262},
    },
}
"""Numbers of the system calls that fail with EPERM, by architecture. Some of these calls start programs or processes,
reach other processes or the network, or create objects that outlive the process. Others watch files or change their
attributes, which Landlock does not prevent.
"""
_REFUSED_EVERYWHERE = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438, "fchmodat2": 452},
    **{"process_madvise": 440, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469},
}
_ON_ITSELF = {
    "x86_64": {"kill": 62, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "prlimit64": 302},
    "aarch64": {
        "kill": 129,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240,
        "prlimit64": 261,
    },
}
"""Numbers of the system calls that a process may use only with itself as the first argument."""
_REFUSED_OPERATIONS = {
    "prctl": ({"x86_64": 157, "aarch64": 167}, 0, (1,)),  # PR_SET_PDEATHSIG
    "fcntl": ({"x86_64": 72, "aarch64": 25}, 1, (8, 15)),  # F_SETOWN, F_SETOWN_EX
    "ioctl": (
        {"x86_64": 16, "aarch64": 29},
        1,
        (0x8901, 0x8902),
    ),  # FIOSETOWN, SIOCSPGRP
}
"""System calls of which only some operations fail with EPERM. For each call: its number by architecture, the place of
the operation among its arguments, and the operations that fail. These operations would let a process
outlive the trainer, or let a pipe or a socket send signals."""
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_AF_UNIX, _SOCK_STREAM, _TYPE_MASK = 1, 1, 0xF
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE_THREAD = 0x10000
_X32_CALLS = 0x40000000
"""Call numbers from this one on belong to the x32 ABI of x86-64, in which the refused calls have other numbers."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refused_calls(machine: str) -> dict[str, int]:
    """Return {name: number} of all system calls that the filter names. Raise KeyError if `machine` has no filter."""
    numbers = _REFUSED[machine] | _REFUSED_EVERYWHERE | _ON_ITSELF[machine]
    numbers |= {name: by_machine[machine] for name, (by_machine, _, _) in _REFUSED_OPERATIONS.items()}
    return numbers | {"socketpair": _SOCKETPAIR[machine], "clone": _CLONE[machine], "clone3": _CLONE3}


def install_filter() -> None:
    """From now on, refuse the calls of `_REFUSED`, new processes, and signals to other processes. Allow new threads.

    Raises:
        OSError: if there is no filter for this machine, or if the kernel refuses the filter.
    """
    machine = platform.machine()
    if machine not in _REFUSED:
        raise OSError(errno.ENOSYS, f"there is no system call filter for {machine}")
    instructions = b"".join(_instructions(machine, os.getpid()))
    program = _Program(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _instructions(machine: str, pid: int) -> list[bytes]:
    program = [_op(_LOAD, _ARCH), _op(_EQUAL, _AUDIT_ARCH[machine], 1, 0), _op(_RETURN, _KILL_PROCESS)]
    program += [_op(_LOAD, _NUMBER), _op(_AT_LEAST, _X32_CALLS, 0, 1), _fail(errno.EPERM)]
    for number in (*_REFUSED[machine].values(), *_REFUSED_EVERYWHERE.values()):
        program += [_op(_EQUAL, number, 0, 1), _fail(errno.EPERM)]
    # The flags of clone3 lie in memory, which a filter cannot read. If clone3 fails, the C library uses clone.
    program += [_op(_EQUAL, _CLONE3, 0, 1), _fail(errno.ENOSYS)]
    program += [_op(_EQUAL, _CLONE[machine], 0, 4), _op(_LOAD, _FIRST_ARGUMENT)]
    program += [_op(_ANY_BIT, _CLONE_THREAD, 1, 0), _fail(errno.EPERM), _op(_RETURN, _ALLOW)]
    for by_machine, place, operations in _REFUSED_OPERATIONS.values():
        program += [_op(_EQUAL, by_machine[machine], 0, 2 + 2 * len(operations))]
        program += [_op(_LOAD, _FIRST_ARGUMENT + 8 * place)]
        for operation in operations:
            program += [_op(_EQUAL, operation, 0, 1), _fail(errno.EPERM)]
        program += [_op(_RETURN, _ALLOW)]
    for name, number in _ON_ITSELF[machine].items():
        means_itself = [_op(_EQUAL, pid, 2, 0), _op(_EQUAL, 0, 1, 0)] if name == "prlimit64" else []
        means_itself = means_itself or [_op(_EQUAL, pid, 1, 0)]
        program += [_op(_EQUAL, number, 0, 3 + len(means_itself)), _op(_LOAD, _FIRST_ARGUMENT)]
        program += [*means_itself, _fail(errno.EPERM), _op(_RETURN, _ALLOW)]
    # asyncio needs pairs of stream sockets. A datagram socket could send to any socket in the file system.
    program += [_op(_EQUAL, _SOCKETPAIR[machine], 0, 7)]
    program += [_op(_LOAD, _FIRST_ARGUMENT), _op(_EQUAL, _AF_UNIX, 0, 3)]
    program += [_op(_LOAD, _SECOND_ARGUMENT), _op(_AND, _TYPE_MASK), _op(_EQUAL, _SOCK_STREAM, 1, 0)]
    program += [_fail(errno.EPERM), _op(_RETURN, _ALLOW)]
    return [*program, _op(_RETURN, _ALLOW)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _op(_RETURN, _FAIL | number)
