"""The program of a helper process of the reward `math`, which compares answers with gold answers."""

from __future__ import annotations

from a2tgpo.lifecycle.helper_process import serve

COMPARE_S, LONGEST_S = 3, 60
"""Limits for comparing one answer: seconds of CPU time, and seconds of wall-clock time."""


def are_equal(answer: str, golds: list[str]) -> bool:
    """Return whether `answer` is equal to one of `golds`."""
    from math_verify import verify

    found = _parsed(answer)
    return any(verify(_parsed(gold), found, timeout_seconds=None) for gold in golds)


def _parsed(text: str) -> list:
    from math_verify import parse

    # Without a time limit, math-verify logs warnings, which `serve` disables.
    return parse(f"${text.strip().strip('$')}$", parsing_timeout=None)


if __name__ == "__main__":
    serve(are_equal, example=("1", ["1"]), cpu_s=COMPARE_S, longest_s=LONGEST_S)
