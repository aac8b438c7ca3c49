"""How the user's mistakes are reported, and other errors summarised: in one line."""

MAX_MESSAGE = 2000
"""Characters of a message that are shown."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line meant for the person who wrote it."""

    def __init__(self, message: str):
        # What it quotes may hold anything: line breaks, terminal codes, halves of characters.
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]} ...")


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming `key`, its `value` and the `rule` unless `holds`."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {rule}")


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of the message, or the type's name if there is none (a bare `assert`)."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
