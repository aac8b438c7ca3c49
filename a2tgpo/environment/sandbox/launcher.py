"""A program that drops its privileges, and then runs pieces of the policy's Python code one after another.

    python -I -S launcher.py SETTINGS CONTROL

SETTINGS is the JSON text of the settings, and CONTROL is the file descriptor of a pipe. On standard input, each
piece of code is sent as its number of bytes in decimal digits, a line break, and its bytes in UTF-8. The code's
output goes to standard output. The launcher writes to CONTROL: b"." once it is ready and after each piece of code, or
b"!" and a text if it cannot confine itself. The launcher imports only the standard library.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import io
import json
import linecache
import math
import os
import resource
import runpy
import signal
import struct
import sys
import traceback
from typing import Any

_BESIDE = os.path.dirname(os.path.abspath(__file__))
_NEW_USER, _NEW_NETWORK, _NEW_MOUNTS, _NEW_IPC = 0x10000000, 0x40000000, 0x00020000, 0x08000000
_MOUNT_PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE
_MOUNT_PLAIN = 2 | 4 | 8  # MS_NOSUID | MS_NODEV | MS_NOEXEC
_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION = 0x20080522
_CODE_NAME = "<code>"
SYSTEM_FILES = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)


def main() -> None:
    settings, control = json.loads(sys.argv[1]), int(sys.argv[2])
    codes = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        _confine(settings)
    except Exception as error:
        os.write(control, f"!{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(control, b".")
    scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    while size := codes.readline():
        _limit_cpu(settings["timeout_s"])
        _run(codes.read(int(size)).decode(), scope)
        os.write(control, b".")
    os._exit(0)


def _confine(settings: dict[str, Any]) -> None:
    """Set the limits, and give up access to everything that the code does not need."""
    if settings["isolation"] != "bwrap":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if settings["isolation"] == "namespace":
        _enter_namespaces(settings["folder"], settings["folder_bytes"])
    os.chdir(settings["folder"])
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if settings["packages"]:
        sys.meta_path.append(_Packages(settings["packages"]))
    system_calls = runpy.run_path(os.path.join(_BESIDE, "syscall_filter.py"))
    if settings["isolation"] != "bwrap":
        readable = (
            *SYSTEM_FILES,
            sys.base_prefix,
            sys.base_exec_prefix,
            *filter(None, [settings["packages"]]),
        )
        files = runpy.run_path(os.path.join(_BESIDE, "file_access.py"))
        files["restrict_files"](readable=readable, writable=(settings["folder"], os.devnull))
    _drop_capabilities()
    system_calls["install_filter"]()


class _Packages:
    """Finds modules in the folder `python.packages`, if no other folder has them."""

    def __init__(self, folder: str):
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [self._folder], target) if path is None else None


def _enter_namespaces(folder: str, folder_bytes: int) -> None:
    """Move this process into new network, IPC and mount namespaces. In these namespaces, `folder` is an empty folder
    in memory."""
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_MOUNTS | _NEW_IPC), libc, "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(_MOUNT_PRIVATE), None), libc, "mount")
    options = f"size={folder_bytes},mode=700".encode()
    _check(
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(_MOUNT_PLAIN), options), libc, "mount"
    )


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _check(libc.capset(header, bytes(24)), libc, "capset")


def _check(result: int, libc: ctypes.CDLL, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _limit_cpu(timeout_s: float) -> None:
    """Let the kernel end the process soon after the next piece of code has used `timeout_s` seconds of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _run(code: str, scope: dict[str, Any]) -> None:
    """Run the code. Print the value of its last expression, if there is one, or the error that ended the code."""
    sys.stdout = sys.stderr = _output()
    linecache.cache[_CODE_NAME] = (len(code), None, code.splitlines(keepends=True), _CODE_NAME)
    try:
        tree = ast.parse(code, _CODE_NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _CODE_NAME, "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), _CODE_NAME, "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass
    except BaseException as error:
        _flush()
        _show(error)
    _flush()


def _output() -> io.TextIOWrapper:
    """Return a new writer to the standard output, because earlier code may have closed or replaced the previous
    writer."""
    raw = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
    return io.TextIOWrapper(raw, "utf-8", "replace", line_buffering=True)


def _flush() -> None:
    with contextlib.suppress(BaseException):
        sys.stdout.flush()


def _show(error: BaseException) -> None:
    """Print the traceback without the launcher's own frames."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != _CODE_NAME:
        frame = frame.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error.with_traceback(frame), frame))
    except Exception:  # for example, the error's own __str__ fails, or no memory is left
        text = type(error).__name__
    os.write(1, text.encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
