"""The program of a helper process of the reward `math`, which compares answers with gold answers.

The program prints "ready". Then it reads lines of JSON, [answer, [gold, ...]], and prints "true" or "false" for each
line. The kernel ends the process if a line takes too long. A signal handler in Python could not interrupt a
calculation with large numbers. The limit is CPU time, so that a busy machine does not change a result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys

START_S, LONGEST_S = 60, 60
"""Longest times in seconds for the start of the process, and for the comparison of one answer."""
COMPARE_S = 3
"""Longest CPU time in seconds for the comparison of one answer."""
LIMIT_SIGNALS = (signal.SIGPROF, signal.SIGALRM)
"""Signals that end the process if a line takes too long."""
MEMORY_BYTES = 4 * 2**30
"""Largest address space of the process."""


def are_equal(answer: str, golds: list[str]) -> bool:
    """Return whether `answer` is equal to one of `golds`."""
    from math_verify import verify

    found = _parsed(answer)
    return any(verify(_parsed(gold), found, timeout_seconds=None) for gold in golds)


def _parsed(text: str) -> list:
    from math_verify import parse

    return parse(f"${text.strip().strip('$')}$", parsing_timeout=None)


def main() -> None:
    for limit in LIMIT_SIGNALS:
        signal.signal(limit, signal.SIG_DFL)
    signal.alarm(START_S)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # without a time limit, math-verify logs warnings
    are_equal("1", ["1"])  # imports math-verify
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        print("ready", file=answers, flush=True)
        signal.alarm(0)
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, COMPARE_S)
            signal.alarm(LONGEST_S)
            try:
                equal = are_equal(*json.loads(line))
            except Exception:  # math-verify can fail in many ways on text that is no mathematics
                equal = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    main()
