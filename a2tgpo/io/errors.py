"""Report users' mistakes, and summarise other errors, in one line."""

import difflib
from collections.abc import Sequence

MAX_MESSAGE = 2000
"""Longer messages are cut to this many characters."""


class ConfigError(ValueError):
    """The program cannot run as configured; the message is one line for the author of the configuration."""

    def __init__(self, message: str):
        # Quoted input may contain anything: line breaks, terminal codes, lone surrogates.
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]} ...")


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise a `ConfigError` that names `key`, its `value` and the `rule`, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {rule}")


def one_of(choices: Sequence[str], value: object) -> str:
    """Return the rule that names `choices`, and which of them is near to `value`, if one is."""
    near = difflib.get_close_matches(value[:100], choices, n=1) if isinstance(value, str) else []
    return " | ".join(choices) + "".join(f" (nearest: {name})" for name in near)


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the message; if there is none (a bare `assert`), the type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
