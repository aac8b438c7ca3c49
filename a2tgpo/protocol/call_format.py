"""The interface of a call format, and the list of all formats."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from a2tgpo.config.rollout import FORMATS_PACKAGE

MAX_CALLS = 64
"""Largest number of calls that are read in one turn. Further calls are ignored, so no turn takes long to read."""
MAX_CALL_CHARS = 32_768
"""Largest number of characters of one call."""


@dataclass(frozen=True, kw_only=True)
class WrittenCall:
    """A call as the policy wrote it, before it is checked against the tool's parameters."""

    text: str
    """The call's own text, without the tags around it."""
    name: str = ""
    """Name of the tool, or empty if it cannot be read."""
    arguments: Mapping[str, Any] | None = None
    """The arguments, or None if they cannot be read."""
    has_texts: bool = False
    """Whether all arguments are texts, because the format does not show their types."""
    problem: str | None = None
    """What is wrong with the form of the call, or None if nothing is wrong."""


class CallFormat(Protocol):
    """Reads and writes the tool calls in a turn's text."""

    tags: tuple[str, ...]
    """The tags around a call. They are removed from the answers of tools."""

    def find_calls(self, text: str) -> list[WrittenCall]:
        """Return all calls in `text`, in order. Raise no error for any text, and take time linear in its length.

        Args:
            text: the visible part of a turn, without the token that ended the turn.
        """

    def write(self, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Return a turn with the visible `text` and `calls`, which are pairs (name, arguments)."""


def load_format(name: str) -> CallFormat:
    found: CallFormat = importlib.import_module(f"{FORMATS_PACKAGE}.{name}").FORMAT
    return found


def decode_object(text: str, start: int) -> tuple[Any, int]:
    """Decode the JSON value that begins at `start`, and return the value and the position of its end.

    If a key is repeated, its last value is used.

    Raises:
        ValueError: if there is no valid JSON value.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        if "\\u" in text[start:end]:
            dump_json(value).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot encode
        raise ValueError("a text has half of a surrogate pair") from None
    return value, end


def read_call(text: str, value: Any, *, keys: Sequence[str]) -> WrittenCall:
    """Return the call that the decoded JSON `value` describes.

    Args:
        text: the text from which `value` was decoded.
        keys: keys under which `value` may hold the arguments, the usual key first.
    """
    if len(text) > MAX_CALL_CHARS:
        return WrittenCall(
            text=text[:MAX_CALL_CHARS], problem=f"the call is longer than {MAX_CALL_CHARS} characters"
        )
    if not isinstance(value, dict):
        return WrittenCall(text=text, problem="the call is not a JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return WrittenCall(text=text, problem='the call has no "name"')
    key = next((key for key in keys if key in value), keys[0])
    arguments = value.get(key)
    if isinstance(arguments, str):
        arguments = _object_in(arguments)
    if not isinstance(arguments, dict):
        return WrittenCall(text=text, name=name, problem=f'"{key}" is not a JSON object')
    return WrittenCall(text=text, name=name, arguments=arguments)


def dump_json(value: Any) -> str:
    """Return `value` as JSON in the form in which chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _object_in(text: str) -> Any:
    try:
        value, end = decode_object(text.strip(), 0)
    except ValueError:
        return None
    return value if end == len(text.strip()) else None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(f"{digits:.40}")


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
