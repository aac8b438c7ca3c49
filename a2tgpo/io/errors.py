"""Report users' mistakes and other errors in one line."""

import difflib
from collections.abc import Sequence

MAX_MESSAGE = 2000
"""Longest message, in characters."""


class ConfigError(ValueError):
    """Raised if the program cannot run as configured. Its message is one line."""

    def __init__(self, message: str):
        # Quoted input may contain line breaks, terminal codes or lone surrogates.
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]} ...")


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise a `ConfigError` that names `key`, `value` and `rule` if `holds` is False."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {rule}")


def one_of(choices: Sequence[str], value: object) -> str:
    """Return a rule for `require`: the list of `choices`, then the choice nearest to `value` if one is similar."""
    near = difflib.get_close_matches(value[:100], choices, n=1) if isinstance(value, str) else []
    return " | ".join(choices) + "".join(f" (nearest: {name})" for name in near)


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the error's message, or the error's type if the message is blank."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
