"""Run work in helper processes, which the kernel ends if they take too long or use too much memory.

A thread cannot be stopped, and a signal handler in Python cannot interrupt a long call of a library written in C.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

START_S = 60
"""Longest time in seconds for the start of a process."""
LIMIT_SIGNALS = (signal.SIGPROF, signal.SIGALRM)
"""Signals that end a process if a request takes too long."""
MEMORY_BYTES = 4 * 2**30
"""Largest address space of a process."""


class HelperStartError(RuntimeError):
    """A helper process could not be started. The message is one line."""


class RequestFailedError(RuntimeError):
    """The program raised an exception, or its process ended, for example because its memory was used up."""


class HelperPool:
    """Helper processes that each answer one request at a time. Many threads may use the pool.

    A new process starts only if all running processes are busy.

    Args:
        module: the program, a module that calls `serve`.
        number: largest number of processes.
    """

    def __init__(self, module: str, *, number: int):
        self._helpers = [_Helper(module) for _ in range(number)]
        self._free: queue.LifoQueue[_Helper] = queue.LifoQueue()
        for helper in self._helpers:
            self._free.put(helper)

    def ask(self, *request: Any) -> Any:
        """Return the program's answer to `request`. Both are JSON values.

        Raises:
            TimeoutError: the request took too long.
            RequestFailedError: the program failed at this request.
            HelperStartError: no process could be started.
        """
        helper = self._free.get()
        try:
            return helper.ask(request)
        finally:
            self._free.put(helper)

    def close(self) -> None:
        for helper in self._helpers:
            helper.end()


class _Helper:
    """One process, which starts at its first request."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Sequence[Any]) -> Any:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            code = self.end()
            if -code in LIMIT_SIGNALS:
                raise TimeoutError
            raise RequestFailedError(f"the process of {self._module} ended with exit code {code}")
        answer, error = json.loads(line)
        if error is not None:
            raise RequestFailedError(error)
        return answer

    def end(self) -> int:
        """End the process. Return its exit code, or 0 if there is no process."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        error = json.loads(line) if line.endswith("\n") else f"{self._module} did not start"
        if error is not None:
            self.end()
            raise HelperStartError(error)
        return process


def serve(answer: Callable[..., Any], *, example: Sequence[Any], cpu_s: float, longest_s: int) -> None:
    """Answer the requests of a `HelperPool`. This is the main function of a helper program.

    The program first writes a line of JSON: null if it is ready, or else its error. Then it reads a request from each
    line of the standard input, and writes [answer, null] or [null, error].

    Args:
        answer: returns the answer to a request.
        example: a request that is answered first, so that the time of imports does not count.
        cpu_s: longest CPU time of a request, in seconds. Unlike wall time, it does not grow if the machine is busy.
        longest_s: longest wall time of a request, in seconds.
    """
    for limit in LIMIT_SIGNALS:
        signal.signal(limit, signal.SIG_DFL)
    signal.alarm(START_S)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer(*example)
        except Exception as error:
            print(json.dumps(_line(error)), file=answers, flush=True)
            return
        print("null", file=answers, flush=True)
        signal.alarm(0)
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            signal.alarm(longest_s)
            try:
                reply = [answer(*json.loads(line)), None]
            except Exception as error:  # the libraries fail in many ways on hostile input
                reply = [None, _line(error)]
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            print(json.dumps(reply), file=answers, flush=True)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
