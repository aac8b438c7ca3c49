"""Convert YAML files and `section.field=value` arguments to a checked `RunConfig`, and back.

A file may name a base file with `base:` (relative to itself). A file's own values override its base's values, and
arguments override files. An argument may also be a file, such as a preset of configs/algorithm/. All other relative
paths in a configuration are relative to the folder in which the program is started. In paths, ~ and ${NAME} are
replaced.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from a2tgpo.config.expand import escape, expand, is_expanded
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.text_file import decode

BASE_KEY = "base"
COMMAND_LINE = "command line"
FILE_SUFFIXES = (".yaml", ".yml")

# YAML 1.1 parses 1e-6 as a text because it has no dot, but users mean a number.
_FLOAT_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# YAML 1.1 parses 012 as 10. (0x1f and 0b11 show their base, so they are allowed.)
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*")
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    dict: "a mapping of names to values, like {name: value}",
}


@dataclass(frozen=True)
class _Entry:
    value: Any
    source: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration from the YAML file `path` and its bases, then apply `overrides`.

    Args:
        path: YAML file of sections.
        overrides: `section.field=value`, or a YAML file of sections with its own bases; later ones win. Values are
            parsed as YAML, except texts, which are used unchanged.

    Raises:
        ConfigError: one line that names the file (or the command line), the key, its value and the allowed values.
    """
    fields = dict(_leaf_types(RunConfig))
    entries = dict(_file_entries(Path(expand(str(path), "the configuration file")), fields))
    entries.update(_override_entries(overrides, fields))
    _require_all(RunConfig, entries, str(path))
    for key in _expanded_keys(RunConfig):
        if key in entries:
            value, source = entries[key].value, entries[key].source
            entries[key] = _Entry(expand(value, f"{source}: {key}"), source)
    try:
        return _build(RunConfig, "", entries)
    except ConfigError as error:
        # The section's error starts with the key; add the source that set the key last.
        key = str(error).split(" ", 1)[0]
        source = entries[key].source if key in entries else str(path)
        raise ConfigError(f"{source}: {error}") from None


def is_file(override: str) -> bool:
    """Return whether an override is the name of a YAML file rather than a field's value."""
    return override.endswith(FILE_SUFFIXES) and "=" not in override


def overridden_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted keys of all fields that `overrides`, arguments as for `load_config`, set.

    Raises:
        ConfigError: as `load_config`.
    """
    return frozenset(key for key, _ in _override_entries(overrides, dict(_leaf_types(RunConfig))))


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of plain values, with every key."""
    return dataclasses.asdict(config)


def flat_config(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values by dotted key; mappings become JSON texts."""
    flat: dict[str, Any] = {}
    for key, _ in _leaf_types(RunConfig):
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        flat[key] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
    return flat


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML with every key; `load_config` restores an equal one."""
    sections = config_to_dict(config)
    for key in _expanded_keys(RunConfig):
        *path, name = key.split(".")
        section = functools.reduce(operator.getitem, path, sections)
        section[name] = escape(section[name])
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=10**6)


def _leaf_types(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield (dotted key, type) of every field below `section` that is not a section itself."""
    for name, kind in get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type), f"{prefix}{name} holds an instance where its class is meant"
            yield from _leaf_types(kind, f"{prefix}{name}.")
        else:
            assert kind in _TYPE_NAMES, f"{prefix}{name}: configuration fields cannot be of type {kind}"
            yield prefix + name, kind


def _expanded_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the fields of type `Expanded` below `section`."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _expanded_keys(kind, f"{prefix}{name}.")
        elif is_expanded(kind):
            yield prefix + name


def _file_entries(path: Path, fields: dict[str, type]) -> Iterator[tuple[str, _Entry]]:
    """Yield the values in the file `path`, after those of its bases."""
    for file in reversed(_base_chain(path)):
        yield from _flatten(_read_yaml(file), RunConfig, "", str(file), fields)


def _override_entries(overrides: Sequence[str], fields: dict[str, type]) -> Iterator[tuple[str, _Entry]]:
    """Yield the values that `overrides` set, in their order."""
    for override in overrides:
        if is_file(override):
            yield from _file_entries(Path(expand(override, COMMAND_LINE)), fields)
        else:
            yield from _parse_override(override, fields)


def _base_chain(path: Path) -> list[Path]:
    """Return `path`, its base, the base's base, and so on."""
    chain: list[Path] = []
    named_by = ""
    while True:
        if any(path.resolve() == seen.resolve() for seen in chain):
            circle = " -> ".join(str(file) for file in [*chain, path])
            raise ConfigError(f"{chain[-1]}: base is {str(path)!r}, which goes round in a circle: {circle}")
        if not path.is_file():
            raise ConfigError(f"{named_by}no configuration file {path}; give an existing YAML file")
        chain.append(path)
        base = _read_yaml(path).get(BASE_KEY)
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigError(
                f"{path}: base is {base!r:.80}; allowed: the path of one YAML file, relative to this one"
            )
        named_by = f"{path}: base: "
        path = path.parent / expand(base, f"{path}: base")


class _StrictLoader(yaml.SafeLoader):
    """A loader like `yaml.safe_load` that also refuses input with a surprising meaning.

    It refuses repeated keys in a mapping, aliases of lists and mappings (nested aliases grow exponentially), integers
    too long for an error message, and numbers that YAML 1.1 parses in base 8 or 60.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, is_alias = self.peek_event(), self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                None,
                None,
                f"*{event.anchor} stands for more than one value; write them out",
                event.start_mark,
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                continue
            if key_node.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands there a second time", key_node.start_mark
                )
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._refuse_other_bases(node)
        value = super().construct_yaml_int(node)
        if value.bit_length() > 1024:
            raise yaml.constructor.ConstructorError(None, None, "integer past 2^1024", node.start_mark)
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._refuse_other_bases(node)
        return super().construct_yaml_float(node)

    def _refuse_other_bases(self, node: yaml.ScalarNode) -> None:
        if ":" in node.value or _OCTAL.fullmatch(node.value):
            base = 60 if ":" in node.value else 8
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value:.40} is a number in base {base} there; write it in base 10, or a text in quotes",
                node.start_mark,
            )


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_YAML_FAULTS = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _StrictLoader(decode(path.read_bytes(), str(path))).get_single_data()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except _YAML_FAULTS as error:
        raise ConfigError(f"{path}{_yaml_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {type(content).__name__} found; a configuration is a mapping of sections")
    return content


def _yaml_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return f"{where}: not valid YAML ({' '.join(str(reason).split())})"


def _flatten(
    mapping: dict, section: type, prefix: str, source: str, fields: dict[str, type]
) -> Iterator[tuple[str, _Entry]]:
    """Yield (dotted key, typed value) for every value in `mapping`."""
    hints = get_type_hints(section)
    for name, value in mapping.items():
        if not prefix and name == BASE_KEY:
            continue
        key = f"{prefix}{name}"
        if name not in hints:
            candidates = _sections(fields) if isinstance(value, dict) else list(fields)
            raise ConfigError(f"{source}: unknown key {key}; nearest valid key: {_nearest(key, candidates)}")
        if not dataclasses.is_dataclass(hints[name]):
            yield key, _Entry(_typed(value, hints[name], key, source), source)
        elif isinstance(value, dict):
            yield from _flatten(value, hints[name], f"{key}.", source, fields)
        elif value is not None:
            example = _example(key, fields)
            raise ConfigError(
                f"{source}: {key} is {value!r:.80}; allowed: a section, with keys like {example}"
            )


def _parse_override(override: str, fields: dict[str, type]) -> Iterator[tuple[str, _Entry]]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(
            f"{COMMAND_LINE}: {override!r} has no value; write section.field=value or name a .yaml file"
        )
    if key not in fields:
        if any(field.startswith(f"{key}.") for field in fields):
            example = _example(key, fields)
            raise ConfigError(f"{COMMAND_LINE}: {key} is a section; set one of its keys, like {example}=...")
        raise ConfigError(
            f"{COMMAND_LINE}: unknown key {key}; nearest valid key: {_nearest(key, list(fields))}"
        )
    value: Any = text
    if fields[key] is not str:
        try:
            value = _StrictLoader(text).get_single_data()
        except _YAML_FAULTS:
            value = text  # if no text is allowed, refused below with the key
    yield key, _Entry(_typed(value, fields[key], key, COMMAND_LINE), COMMAND_LINE)


def _typed(value: Any, kind: type, key: str, source: str) -> Any:
    """Return `value` if it has type `kind`; a float may also be written as an integer, or as a text such as 1e-6."""
    if kind is float and not isinstance(value, bool):
        number = value
        if isinstance(value, str) and _FLOAT_TEXT.fullmatch(value):
            number = float(value)
        if isinstance(number, int | float) and _is_finite(number):
            return float(number)
    elif type(value) is kind:
        texts = [text for pair in value.items() for text in pair] if isinstance(value, dict) else [value]
        if any(isinstance(text, str) and not _is_whole(text) for text in texts):
            raise ConfigError(f"{source}: {key} is {value!r:.80}; allowed: a text in UTF-8 without NUL")
        return value
    hint = " (put it in quotes)" if kind is str and not isinstance(value, dict | list | None) else ""
    if value is None:
        hint = " (YAML reads a lone ~ and an empty value as null)"
    raise ConfigError(f"{source}: {key} is {value!r:.80}; allowed: {_TYPE_NAMES[kind]}{hint}")


def _is_whole(text: str) -> bool:
    """Return False for a NUL, which no path may contain, or a lone surrogate, which cannot be encoded."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _sections(fields: dict[str, type]) -> list[str]:
    """Return the dotted keys of all sections that contain `fields`."""
    return list(dict.fromkeys(key[:end] for key in fields for end, letter in enumerate(key) if letter == "."))


def _nearest(key: str, candidates: Sequence[str]) -> str:
    """Return the candidate most similar to `key`, as a whole and in its last part."""
    key = key[:100]  # the comparison takes quadratic time
    leaf = key.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(candidates, key=likeness)


def _example(section_key: str, fields: dict[str, type]) -> str:
    return next(field for field in fields if field.startswith(f"{section_key}."))


def _require_all(section: type, entries: dict[str, _Entry], path: str) -> None:
    missing = sorted(_missing(section, "", entries))
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f"{path}: required and not set: {names}; set it there or as {missing[0]}=value")


def _missing(section: type, prefix: str, entries: dict[str, _Entry]) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        key = prefix + field.name
        optional = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _missing(hints[field.name], f"{key}.", entries)
        elif not optional and key not in entries:
            yield key


def _build(section: Any, prefix: str, entries: dict[str, _Entry]) -> Any:
    hints = get_type_hints(section)
    values: dict[str, Any] = {}
    for name, kind in hints.items():
        key = prefix + name
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, f"{key}.", entries)
        elif key in entries:
            values[name] = entries[key].value
    return section(**values)
