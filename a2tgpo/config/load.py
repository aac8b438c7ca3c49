"""Convert YAML files and `section.field=value` arguments to a checked `RunConfig`, and a `RunConfig` to YAML.

A file may name a base file under the key `base`, as a path relative to the file's folder. A file's values override
those of its base, and arguments override files. All other relative paths are relative to the folder in which the
program starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from a2tgpo.config.expand import escape, expand, in_all_texts, is_expanded
from a2tgpo.config.renamed import RENAMED
from a2tgpo.config.run import RunConfig
from a2tgpo.config.strict_yaml import read_mapping, read_value
from a2tgpo.io.errors import ConfigError, one_of

BASE_KEY = "base"
COMMAND_LINE = "command line"
FILE_SUFFIXES = (".yaml", ".yml")

# YAML 1.1 reads 1e-6 as a text because it has no dot.
_FLOAT_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LISTS = (tuple[str, ...], tuple[int, ...])
_NUMBERS = tuple[float, ...]
_NUMBERS_BY_NAME = (dict[str, float], str | dict[str, float])
_RULES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    dict: "a mapping of names to values, like {name: value}",
    dict[str, float]: "a mapping of names to numbers, like {name: 0.5}",
    str | dict[str, float]: "a text, or a mapping of names to numbers, like {name: 0.5}",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of integers",
    _NUMBERS: "a list of finite numbers",
}


@dataclass(frozen=True)
class _Field:
    kind: Any
    """A key of `_RULES`, or a `Literal` of texts."""
    is_expanded: bool
    is_required: bool


@dataclass(frozen=True)
class _Entry:
    value: Any
    source: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in the YAML file `path` and its base files. `overrides` override the files' values.

    Args:
        path: YAML file of sections.
        overrides: texts of the form `section.field=value`, and paths of YAML files of sections. Later overrides win.
            A value is read as YAML, unless the field is a text or a choice.

    Raises:
        ConfigError: with a one-line message, if a setting is missing or invalid.
    """
    entries = dict(_file_entries(Path(expand(str(path), "the configuration file"))))
    entries.update(_override_entries(overrides))
    if missing := sorted(key for key, field in _FIELDS.items() if field.is_required and key not in entries):
        names = ", ".join(missing)
        raise ConfigError(f"{path}: required and not set: {names}; set it there or as {missing[0]}=value")
    for key, entry in entries.items():
        if _FIELDS[key].is_expanded:
            place = f"{entry.source}: {key}"
            expanded = in_all_texts(entry.value, functools.partial(expand, key=place))
            if isinstance(expanded, dict) and len(expanded) < len(entry.value):
                names = ", ".join(map(str, entry.value))
                raise ConfigError(f"{place} has names for the same file: {names:.200}; name each file once")
            entries[key] = _Entry(expanded, entry.source)
    try:
        return _build(RunConfig, "", entries)
    except ConfigError as error:
        # The section's message begins with the key. Put the key's source before the message.
        key = str(error).split(" ", 1)[0]
        source = entries[key].source if key in entries else str(path)
        raise ConfigError(f"{source}: {error}") from None


def is_file(override: str) -> bool:
    """Return whether an override is the path of a YAML file."""
    return override.endswith(FILE_SUFFIXES) and "=" not in override


def overridden_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted keys of all fields that `overrides` (see `load_config`) set."""
    return frozenset(key for key, _ in _override_entries(overrides))


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of plain values, including defaults."""
    return dataclasses.asdict(config)


def flat_config(config: RunConfig) -> dict[str, Any]:
    """Return the value of every field by its dotted key, as `flat_value` converts it."""
    return {key: flat_value(functools.reduce(getattr, key.split("."), config)) for key in _FIELDS}


def flat_value(value: Any) -> Any:
    """Return a field's value as a number or a text: a mapping as JSON, a list with commas between its items."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML with every key. `load_config` reads the same configuration from this YAML."""
    sections = config_to_dict(config)
    for key in (key for key, field in _FIELDS.items() if field.is_expanded):
        *path, name = key.split(".")
        section = functools.reduce(operator.getitem, path, sections)
        section[name] = in_all_texts(section[name], escape)
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=10**6)


def _fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, _Field]]:
    """Yield the dotted key and the description of every field in `section` and its subsections."""
    hints = get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type), f"{key} must have a class as its type, not an instance"
            yield from _fields_of(kind, f"{key}.")
        else:
            plain = kind.__origin__ if is_expanded(kind) else kind
            assert get_origin(plain) is Literal or plain in _RULES, f"{key} cannot be of type {plain}"
            has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            yield key, _Field(plain, is_expanded=is_expanded(kind), is_required=not has_default)


_FIELDS = dict(_fields_of(RunConfig))
_SECTIONS = list(dict.fromkeys(key[: dot.start()] for key in _FIELDS for dot in re.finditer(r"\.", key)))


def _file_entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    """Yield the settings of the file `path` after those of its bases."""
    for file, mapping in reversed(_base_chain(path)):
        yield from _entries(list(_flatten(mapping)), str(file))


def _override_entries(overrides: Iterable[str]) -> Iterator[tuple[str, _Entry]]:
    """Yield the settings in `overrides`, in order."""
    for override in overrides:
        if is_file(override):
            yield from _file_entries(Path(expand(override, COMMAND_LINE)))
            continue
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(
                f"{COMMAND_LINE}: {override!r} has no value; write section.field=value or name a .yaml file"
            )
        is_literal = (
            key not in _FIELDS or _FIELDS[key].kind is str or get_origin(_FIELDS[key].kind) is Literal
        )
        value = text if is_literal else read_value(text)
        if (
            key in _FIELDS
            and _FIELDS[key].kind == str | dict[str, float]
            and not isinstance(value, dict | list)
        ):
            value = text
        yield from _entries([(key, value)], COMMAND_LINE)


def _base_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and the content of the file `path`, of its base, of the base's base, and so on."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    named_by = ""
    while True:
        files = [file for file, _ in chain]
        if any(path.resolve() == seen.resolve() for seen in files):
            circle = " -> ".join(str(file) for file in [*files, path])
            raise ConfigError(f"{files[-1]}: base is {str(path)!r}, which forms a cycle: {circle}")
        if not path.is_file():
            raise ConfigError(f"{named_by}no configuration file {path}; give an existing YAML file")
        content = read_mapping(path)
        base = content.pop(BASE_KEY, None)
        chain.append((path, content))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigError(
                f"{path}: base is {base!r:.80}; allowed: the path of one YAML file, relative to this one"
            )
        named_by = f"{path}: base: "
        path = path.parent / expand(base, f"{path}: base")


def _flatten(mapping: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every setting in a file, unchecked."""
    for name, value in mapping.items():
        # Without quotes, a name with a dot would look like a key inside a section.
        key = f"{prefix}{name!r}" if "." in str(name) else f"{prefix}{name}"
        if key in _SECTIONS and isinstance(value, dict):
            yield from _flatten(value, f"{key}.")
        elif key not in _SECTIONS or value is not None:
            yield key, value


def _entries(settings: list[tuple[str, Any]], source: str) -> Iterator[tuple[str, _Entry]]:
    """Check the keys and the types of the settings from one source, and yield the settings.

    Raises:
        ConfigError: with a one-line message, if a key names no field, or if a value does not have its field's type.
    """
    if renamed := [f"{key} was renamed: {RENAMED[key]}" for key, _ in settings if key in RENAMED]:
        raise ConfigError(f"{source}: {'; '.join(renamed)}")
    for key, value in settings:
        if key in _SECTIONS:
            example = next(field for field in _FIELDS if field.startswith(f"{key}."))
            raise ConfigError(
                f"{source}: {key} is {value!r:.80}; allowed: a section, with keys like {example}"
            )
        if key not in _FIELDS:
            near = _nearest(key, _SECTIONS if isinstance(value, dict) else list(_FIELDS))
            raise ConfigError(f"{source}: unknown key {key}; nearest valid key: {near}")
        yield key, _Entry(_typed(value, key, source), source)


def _typed(value: Any, key: str, source: str) -> Any:
    """Convert `value` to the type of field `key`. A float field also accepts an integer, or a text such as 1e-6."""
    kind = _FIELDS[key].kind
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    typed: Any
    if kind is float:
        typed = _number(value)
    elif kind == _NUMBERS:
        numbers = [_number(item) for item in value] if isinstance(value, list) else [None]
        typed = None if None in numbers else tuple(numbers)
    elif kind in _LISTS:
        is_list = isinstance(value, list) and all(type(item) is get_args(kind)[0] for item in value)
        typed = tuple(value) if is_list else None
    elif kind in _NUMBERS_BY_NAME and isinstance(value, dict):
        # A value that is not a number stays unchanged. The section's own check refuses it.
        typed = {name: _read_number(item) for name, item in value.items()}
    elif kind == str | dict[str, float]:
        typed = value if isinstance(value, str) else None
    else:
        typed = value if type(value) is kind or value in choices else None
    if typed is None:
        rule = one_of(choices, value) if choices else _RULES[kind]
        raise ConfigError(f"{source}: {key} is {value!r:.80}; allowed: {rule}{_hint(value, kind)}")
    if isinstance(typed, dict) and not all(isinstance(name, str) for name in typed):
        raise ConfigError(
            f"{source}: {key} is {value!r:.80}; allowed: names that are texts; put them in quotes (YAML reads yes, "
            "no, on and off as true and false)"
        )
    if not all(_is_whole(text) for text in _texts(typed)):
        raise ConfigError(f"{source}: {key} is {value!r:.80}; allowed: a text in UTF-8 without NUL")
    return typed


def _read_number(value: Any) -> Any:
    """Return a text such as 1e-6 as a float, and any other value unchanged."""
    return float(value) if isinstance(value, str) and _FLOAT_TEXT.fullmatch(value) else value


def _number(value: Any) -> float | None:
    """Return `value` as a float; None if `value` is not a finite number."""
    value = _read_number(value)
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # the integer is too large for a float
        return None
    return float(value) if is_number else None


def _hint(value: Any, kind: Any) -> str:
    """Return how to correct `value`, whose type is not `kind`; "" if the correction is obvious."""
    if value is None:
        return " (YAML reads a lone ~ and an empty value as null)"
    if kind in _LISTS and type(value) in (str, get_args(kind)[0]):
        return f"; write [{','.join(item.strip() for item in str(value).split(','))}]"
    return " (put it in quotes)" if kind is str and not isinstance(value, dict | list) else ""


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a field's value, which may be a text, a list or a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.items() if isinstance(value, dict) else value:
            yield from _texts(part)


def _is_whole(text: str) -> bool:
    """Return whether `text` can be part of a path (no NUL) and of a UTF-8 file (no lone surrogate)."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _nearest(key: str, candidates: Sequence[str]) -> str:
    """Return the candidate that is most similar to the dotted key `key`. The last part of a key has double weight."""
    key = key[:100]  # the time of a comparison grows with the square of the length
    leaf = key.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(candidates, key=likeness)


def _build(section: Any, prefix: str, entries: dict[str, _Entry]) -> Any:
    """Return an instance of the dataclass `section`, whose keys begin with `prefix`."""
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        key = prefix + name
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, f"{key}.", entries)
        elif key in entries:
            values[name] = entries[key].value
    return section(**values)
