"""The one way a configuration value is refused."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line meant for the person who wrote it."""


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming `key`, its `value` and the `rule` unless `holds`."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {rule}")
