"""Summarise an error in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the message, or the type's name if there is none (a bare `assert`)."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
