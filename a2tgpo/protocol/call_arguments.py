"""Check the arguments of a call against the tool's parameters, and convert them to the tool's input text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a2tgpo.protocol.call_format import decode_object, dump_json

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


class ArgumentError(ValueError):
    """The arguments do not fit the tool. The message is one line for the policy."""


def argument_text(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Convert `arguments` to the tool's input text.

    If a text is the tool's only parameter, the tool gets this text without blank lines around it. Other tools get all
    arguments as a JSON object.

    Args:
        parameters: the tool's parameters, as a JSON schema of type object.

    Raises:
        ArgumentError: if an argument is missing, unknown, empty or of the wrong type.
    """
    properties: Mapping[str, Any] = parameters.get("properties", {})
    for name in parameters.get("required", ()):
        if name not in arguments:
            raise ArgumentError(f"the argument {name!r} is missing")
    for name, value in arguments.items():
        if name not in properties:
            known = ", ".join(map(repr, properties)) or "none"
            raise ArgumentError(f"there is no argument {name!r:.80}; the arguments are: {known}")
        if not _has_type(value, properties[name].get("type")):
            raise ArgumentError(f"the argument {name!r} is not of type {properties[name]['type']}")
    (only, *others) = properties or [""]
    if others or properties.get(only, {}).get("type") != "string":
        return dump_json(arguments)
    text = str(arguments.get(only, "")).strip("\r\n").rstrip()
    text = text if "\n" in text else text.strip()  # the indent of a program's first line matters
    if not text:
        raise ArgumentError(f"the argument {only!r} is empty")
    return text


def typed(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Decode `arguments`, whose values are texts. A value stays a text if the tool takes it as a text."""
    properties: Mapping[str, Any] = parameters.get("properties", {})
    return {
        name: text if properties.get(name, {}).get("type") == "string" else _decoded(text)
        for name, text in arguments.items()
    }


def one_text(parameters: Mapping[str, Any], text: str) -> dict[str, str] | None:
    """Return arguments in which `text` is the only argument, or None if the tool needs other arguments."""
    properties: Mapping[str, Any] = parameters.get("properties", {})
    names = [name for name, schema in properties.items() if schema.get("type") == "string"]
    return {names[0]: text} if len(properties) == len(names) == 1 else None


def _decoded(text: str) -> Any:
    """Decode `text` as JSON or as a Python constant. If it is neither, return `text`."""
    constants = {"True": True, "False": False, "None": None}
    if text.strip() in constants:
        return constants[text.strip()]
    try:
        value, end = decode_object(text.strip(), 0)
    except ValueError:
        return text
    return value if end == len(text.strip()) else text


def _has_type(value: Any, kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    if any(name not in _TYPES for name in kinds):
        return True  # the schema gives no type
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, _TYPES[name]) for name in kinds)
