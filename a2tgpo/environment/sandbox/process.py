"""The trainer's side of a process that runs the policy's code: start it, run code with a deadline, and end it."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from a2tgpo.config.python import LONGEST_START_S
from a2tgpo.environment.sandbox.output import BoundedOutput

END_S = 2.0
"""Longest wait in seconds for the exit code of a process that has closed its control pipe."""
MAX_CODE_BYTES = 60_000
"""Largest size of one piece of code."""
_CHUNK = 1 << 16
_CHUNKS_AFTER_END = 16
"""Largest number of chunks that are read after the code has ended. Threads of the code may never stop writing."""

Starter = Callable[..., "subprocess.Popen[bytes]"]


class SandboxError(RuntimeError):
    """The process could not be started or confined. The message is one line."""


class SandboxProcess:
    """A process that runs the launcher. Only one thread at a time may call the methods.

    Args:
        command: the launcher's command line without its last argument, which is the file descriptor of the control
            pipe.
        environment: all environment variables of the process.
        folder: folder that `close` removes.
        start: `subprocess.Popen`, or a function with the same arguments.

    Raises:
        SandboxError: if the process does not start or cannot confine itself.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: str | None = None,
        start: Starter = subprocess.Popen,
    ):
        self._folder = folder
        self._control, control = os.pipe()
        try:
            self._process = start(
                [*command, str(control)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=[control],
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._control)
            self._remove_folder()
            raise SandboxError(str(error)) from None
        finally:
            os.close(control)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._control, selectors.EVENT_READ)
        output = BoundedOutput(1000)
        report = self._wait(LONGEST_START_S, output)
        if report != b".":
            self.close()
            said = (report or b"").decode("utf-8", "replace").removeprefix("!") or output.text()
            raise SandboxError(" ".join(said.split()) or "its process ended, or did not start in time")

    def run(self, code: str, *, timeout_s: float, max_output_chars: int) -> tuple[str, str | None]:
        """Run the code. Return its output, and how the process ended (None if it still runs).

        If the process has ended, it is also closed. The code may have at most `MAX_CODE_BYTES` bytes.
        """
        output = BoundedOutput(max_output_chars)
        data = code.encode("utf-8", "replace")
        assert len(data) <= MAX_CODE_BYTES
        deadline = time.monotonic() + timeout_s
        self._send(b"%d\n" % len(data) + data, deadline)
        report = self._wait(deadline - time.monotonic(), output)
        if report == b".":
            return output.text(), None
        end = f"the code ran for more than {timeout_s:g} s and was ended" if report is None else self._end()
        self.close()
        return output.text(), end

    def close(self) -> None:
        """End the process, if it still runs, with all its threads, and remove its folder."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._selector.get_map() is not None:
            self._selector.close()
            os.close(self._control)
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
        self._remove_folder()

    def _send(self, data: bytes, deadline: float) -> None:
        """Write `data` to the launcher. Give up at the deadline, if earlier code keeps the launcher from reading."""
        ready = select.poll()
        ready.register(self._stdin, select.POLLOUT)
        with contextlib.suppress(BrokenPipeError):  # a thread of earlier code has ended the process
            while data and (left_s := deadline - time.monotonic()) > 0:
                if ready.poll(left_s * 1000):
                    data = data[os.write(self._stdin, data) :]

    def _wait(self, timeout_s: float, output: BoundedOutput) -> bytes | None:
        """Collect output until the launcher reports. Return the report, b"" if the launcher ended, or None at the
        deadline."""
        deadline = time.monotonic() + timeout_s
        report = None
        while report is None and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                if key.fd == self._control:
                    report = os.read(self._control, 1000)
                elif not self._read(output):
                    self._selector.unregister(self._stdout)
        for _ in range(_CHUNKS_AFTER_END):
            if not self._read(output):
                break
        return report

    def _read(self, output: BoundedOutput) -> bool:
        """Read a chunk of output if there is one. Return whether a chunk was read."""
        try:
            data = os.read(self._stdout, _CHUNK)
        except BlockingIOError:
            return False
        output.add(data)
        return bool(data)

    def _end(self) -> str:
        """Return how the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        code = self._process.returncode
        if code is None:
            return "the code closed the pipes of its process"
        number = -code if code < 0 else code - 128  # bubblewrap reports signal N as 128 + N, like a shell
        if number in signal.valid_signals():
            return f"the process was ended by {signal.Signals(number).name}"
        return f"the code ended its process with exit code {code}"

    def _remove_folder(self) -> None:
        if self._folder is not None:
            _remove_tree(self._folder)


def _remove_tree(folder: str) -> None:
    """Remove a folder of any depth without recursion. Leave what cannot be removed."""
    with contextlib.suppress(OSError):
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            mark, numbers = secrets.token_hex(8), itertools.count()
            left = _remove_files(top)
            while left:
                name = left.pop()
                with contextlib.suppress(OSError):
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                    try:
                        for inner_name in _remove_files(inner):
                            new_name = f"{mark}-{next(numbers)}"
                            os.rename(inner_name, new_name, src_dir_fd=inner, dst_dir_fd=top)
                            left.append(new_name)
                    finally:
                        os.close(inner)
                    os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        os.rmdir(folder)


def _remove_files(folder: int) -> list[str]:
    """Remove the files in an open folder. Make its subfolders accessible, and return their names."""
    folders = []
    for name in os.listdir(folder):
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError:
            with contextlib.suppress(OSError):
                os.chmod(name, 0o700, dir_fd=folder)
                folders.append(name)
        except OSError:
            continue
    return folders
