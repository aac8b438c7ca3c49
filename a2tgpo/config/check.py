"""The one way a configuration value is refused."""

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
