"""1 if the package math-verify finds that the answer is mathematically equal to a gold answer, else 0.

The answer and the gold answers are LaTeX or plain expressions. For an expression such as 9^{9^{9^9}}, math-verify may
never end or may use up all memory. Because a thread cannot be stopped, helper processes (`reward/math_helper.py`)
compare the answers. If a helper takes too long, it ends, and the answer counts as wrong.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.reward.episode import Episode, RewardError
from a2tgpo.reward.math_helper import LIMIT_SIGNALS

NUM_HELPERS = 4
"""Largest number of helper processes of a rank. A helper starts if all running helpers are busy."""
MODULE = "a2tgpo.reward.math_helper"


class MathEquality:
    needs_answers = True

    def __init__(self) -> None:
        self._helpers = [_Helper() for _ in range(NUM_HELPERS)]
        self._free: queue.LifoQueue[_Helper] = queue.LifoQueue()
        for helper in self._helpers:
            self._free.put(helper)
        self._lock = threading.Lock()
        self._num_timeouts = 0

    def score(self, episode: Episode) -> float:
        if episode.answer is None:
            return 0.0
        helper = self._free.get()
        try:
            return float(helper.are_equal(episode.answer, episode.answers))
        except TimeoutError:
            with self._lock:
                self._num_timeouts += 1
            return 0.0
        finally:
            self._free.put(helper)

    def take_counts(self) -> dict[str, int]:
        """Return how many comparisons have taken too long since the last call."""
        with self._lock:
            number, self._num_timeouts = self._num_timeouts, 0
        return {"timeouts": number}

    def close(self) -> None:
        for helper in self._helpers:
            helper.end()


class _Helper:
    """A process that compares answers. The process starts at the first comparison."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def are_equal(self, answer: str, golds: tuple[str, ...]) -> bool:
        """Return whether `answer` equals one of `golds`, or False if the process ended.

        Raises:
            TimeoutError: the process ended because it took too long.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps([answer, golds]), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line and -self.end() in LIMIT_SIGNALS:
            raise TimeoutError
        return line == "true\n"

    def end(self) -> int:
        """End the process. Return its exit code, or 0 if there is no process."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process = process
        if process.stdout is None or process.stdout.readline() != "ready\n":
            self.end()
            raise RewardError(f"{MODULE} did not start")
        return process


def build(config: RunConfig) -> MathEquality:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "reward.names has 'math', but the package math-verify is not installed; install it with "
            "pip install 'a2tgpo[math]'"
        )
    return MathEquality()
