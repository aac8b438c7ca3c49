"""Report users' mistakes in one line, and summarise other errors in one line."""

import difflib
from collections.abc import Sequence

MAX_MESSAGE = 2000
"""A message of more than this many characters is cut to this length."""


class ConfigError(ValueError):
    """Raised if the program cannot run as configured; the message is one line for the configuration's author."""

    def __init__(self, message: str):
        # Quoted input may contain line breaks, terminal codes or lone surrogates.
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]} ...")


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """If `holds` is False, raise a `ConfigError` that names `key`, its `value` and the `rule`."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {rule}")


def one_of(choices: Sequence[str], value: object) -> str:
    """Return a rule for `require` that lists `choices`; if one of them is similar to `value`, the rule says which."""
    near = difflib.get_close_matches(value[:100], choices, n=1) if isinstance(value, str) else []
    return " | ".join(choices) + "".join(f" (nearest: {name})" for name in near)


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the error's message.

    If the message is blank, as after a bare `assert`, return the name of the error's type.
    """
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
