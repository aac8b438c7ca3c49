"""Write the reference of all settings from the dataclasses of the configuration.

    python tools/upkeep/config_reference.py [--out docs/configuration.md] [--check]

With --check, the program writes nothing, and exits with 1 if the file is out of date.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_text

ROOT = Path(__file__).parents[2]
HEAD = """\
# Configuration

<!-- Written by tools/upkeep/config_reference.py from the dataclasses in a2tgpo/config/. Change those. -->

One YAML file of sections describes a run. `base:` names a file whose values it overrides; on the command line follow
`section.field=value` or further files; later ones win. An unknown key is refused with the nearest known one, a key of
an earlier version with its new name, and a value with what is allowed. `launch/local.sh -n 1 CONFIG --dry-run` prints
the resolved configuration and checks it.

Paths are relative to the folder in which the program starts. Keys without a default are required. A list is a list in
YAML and on the command line, where it needs quotes because shells expand `[`: `'tools.names=[search,calculator]'`.

In paths, `run.name` and `search.url`, a leading `~` or `~USER` and every `${NAME}` or `$NAME` of an environment
variable are replaced, and `$$` means `$`; a variable that is empty or not set is an error. The same applies to
`base:` and to the paths among the arguments of every program. `runs/NAME/config.yaml` contains the result.

Numbers are in base 10: YAML would read `012` in base 8 and `1:30` in base 60, so both are refused. `1e-5` is a
number here although YAML reads it as a text, `1_000` is 1000, and `0x1f` is 31. `yes`, `no`, `on` and `off` are true
and false, as in YAML; put them in quotes if you mean a text. Files are in UTF-8.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, which is one row of the reference."""

    key: str
    kind: str
    default: str
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "configuration.md")
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit 1 if the file is out of date"
    )
    args = parser.parse_args()
    page = reference()
    if args.check:
        if args.out.is_file() and args.out.read_text(encoding="utf-8") == page:
            return 0
        print(f"{args.out} is out of date; run python tools/upkeep/config_reference.py", file=sys.stderr)
        return 1
    write_text(args.out, page)
    print(f"wrote {args.out}")
    return 0


def reference() -> str:
    """Return the text of the page, with a table for each section and subsection."""
    parts = [HEAD]
    for name, section in _sections(RunConfig):
        parts.append(f"\n## {name}\n")
        if says := _class_text(section):
            parts.append(f"\n{says}\n")
        parts.append("\n| key | type | default | |\n|---|---|---|---|\n")
        for setting in _settings(section, name):
            parts.append(f"| `{setting.key}` | {setting.kind} | {setting.default} | {setting.text} |\n")
    return "".join(parts)


def _sections(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield (dotted name, class) for every section below `section`. A section comes before its subsections."""
    for name, kind in get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield f"{prefix}{name}", kind
            yield from _sections(kind, f"{prefix}{name}.")


def _settings(section: type, prefix: str) -> Iterator[Setting]:
    kinds, texts = get_type_hints(section), _field_texts(section)
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(kinds[field.name]):
            yield Setting(
                key=f"{prefix}.{field.name}",
                kind=_kind(kinds[field.name]),
                default=_default(field),
                text=_cell(texts.get(field.name, "")),
            )


def _kind(kind: Any) -> str:
    """Return the text for a setting's type. For a choice, the text lists the allowed values."""
    if get_origin(kind) is Literal:
        return " \\| ".join(f"`{choice}`" for choice in get_args(kind))
    names = {
        dict: "mapping",
        dict[str, float]: "mapping of numbers",
        str | dict[str, float]: "str or mapping of numbers",
        tuple[str, ...]: "list",
        tuple[int, ...]: "list",
        tuple[float, ...]: "list of numbers",
    }
    return names.get(kind) or kind.__name__


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _shown(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _shown(field.default)


def _field_texts(section: type) -> dict[str, str]:
    """Return {name of a field: docstring under the field}."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(section))).body)  # type: ignore[attr-defined]
    texts = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = str(below.value.value)
    return texts


def _class_text(section: type) -> str:
    text = section.__doc__ or ""
    return "" if text.startswith(f"{section.__name__}(") else _in_one_line(text)  # made by dataclass


def _shown(value: object) -> str:
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        value = f"[{', '.join(map(str, value))}]"
    if isinstance(value, str) and len(value) > 60:
        return "a text, see below" if "\n" in value else f"`{_cell(value[:50])}…`"
    return f"`{_cell(str(value).lower() if isinstance(value, bool) else str(value))}`"


def _cell(text: str) -> str:
    return _in_one_line(text).replace("|", "\\|")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
