"""Replace `~` and `${NAME}` in paths. The same rules apply to YAML files, overrides and programs' arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from a2tgpo.io.errors import ConfigError

_MARK = "expanded"
Expanded = Annotated[str, _MARK]
"""Type of a configuration field in which ~ and environment variables are replaced."""
ExpandedMapping = Annotated[dict, _MARK]
"""Type of a field that holds a mapping. The mapping's keys and all texts in its values are expanded."""
ExpandedOrNumbers = Annotated[str | dict[str, float], _MARK]
"""Type of a field that holds a text, or a mapping of texts to numbers. The texts are expanded."""

_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\}?|([A-Za-z_]\w*))")
_NAME = re.compile(r"[A-Za-z_]\w*")


def is_expanded(kind: object) -> bool:
    """Return whether `kind`, a type from `get_type_hints(..., include_extras=True)`, is `Expanded`."""
    return _MARK in getattr(kind, "__metadata__", ())


def expand(text: str, key: str) -> str:
    """Replace a leading ~ or ~USER by the home folder, ${NAME} and $NAME by the variable's value, and $$ by $.

    Args:
        text: a path or an address.
        key: the setting or option with this text, for error messages.

    Raises:
        ConfigError: with a one-line message, if a variable or a home folder in `text` cannot be replaced.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match[2] or match[1]
        if not _NAME.fullmatch(name) or (match[2] is None and not match[0].endswith("}")):
            raise ConfigError(f"{key} is {text!r}; allowed in ${{...}}: the name of an environment variable")
        value = os.environ.get(name, "")
        if not value:
            raise ConfigError(f"{key} is {text!r}, but ${name} is not set or empty; export {name}=...")
        return value

    expanded = _VARIABLE.sub(value_of, text)
    if not expanded.startswith("~"):
        return expanded
    try:
        home = os.path.expanduser(expanded)
    except ValueError:  # the path contains NUL or a lone surrogate
        home = expanded
    if home.startswith("~"):
        raise ConfigError(f"{key} is {text!r}, but {expanded.split('/')[0]} is not a user with a home folder")
    return home


def escape(text: str) -> str:
    """Double every $ in `text`, so that `expand` restores `text`."""
    return text.replace("$", "$$")


def in_all_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with `change` applied to each text. In a mapping, keys and nested texts are changed, too."""
    if isinstance(value, dict):
        return {in_all_texts(name, change): in_all_texts(item, change) for name, item in value.items()}
    return change(value) if isinstance(value, str) else value


def path_argument(text: str) -> Path:
    """Return an argument as an expanded path, for `type=` of argparse."""
    return Path(text_argument(text))


def text_argument(text: str) -> str:
    """Return an argument with `~` and `${NAME}` replaced, for `type=` of argparse."""
    try:
        return expand(text, "the path")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
