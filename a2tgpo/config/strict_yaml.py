"""Read YAML strictly: refuse ambiguous keys and numbers, and aliases that expand to large values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.text_file import decode

# YAML 1.1 reads 012 in base 8, as 10. 0x1f and 0b11 are allowed, because their prefixes show the base.
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*")


class _StrictLoader(yaml.SafeLoader):
    """Load YAML as `yaml.safe_load` does, but refuse duplicate keys, huge integers, numbers that YAML 1.1 reads in
    base 8 or 60, and aliases of lists and mappings.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, is_alias = self.peek_event(), self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                None,
                None,
                f"*{event.anchor} is an alias of a list or mapping; write the values out",
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
                    None, None, f"key {key_node.value!r} occurs twice", key_node.start_mark
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
                f"{node.value:.40} is a number in base {base} in YAML; write it in base 10, or in quotes if it "
                "is a text",
                node.start_mark,
            )


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_FAULTS = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


def read_value(text: str) -> Any:
    """Return the value of `text` as YAML; if `text` is not valid YAML, return `text`."""
    try:
        return _StrictLoader(text).get_single_data()
    except _FAULTS:
        return text


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; an empty file gives an empty mapping.

    Raises:
        ConfigError: with a one-line message that names the place, if the file cannot be read, is not valid YAML, or
            contains no mapping.
    """
    try:
        content = _StrictLoader(decode(path.read_bytes(), str(path))).get_single_data()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except _FAULTS as error:
        raise ConfigError(f"{path}{_fault(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {type(content).__name__} found; a configuration is a mapping of sections")
    return content


def _fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return f"{where}: not valid YAML ({' '.join(str(reason).split())})"
