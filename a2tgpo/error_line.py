"""What an error says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message that is not blank; without one, as after a bare `assert`, its type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
