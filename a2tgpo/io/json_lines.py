"""Read JSONL files, and write them atomically. If a line cannot be read, the error names the line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.text_file import decode_line, open_unpacked


def read_json_lines(path: str | Path, *, key: str) -> Iterator[tuple[str, dict]]:
    """Yield (`"FILE line N"`, object) for every line that is not blank. Only one line is in memory at a time.

    Args:
        path: UTF-8 file with one JSON object per line; may be compressed (`open_unpacked`).
        key: the configuration key or command-line option that names the file, for error messages.

    Raises:
        ConfigError: for the same reasons as `open_unpacked` and `parse_line`.
    """
    with open_unpacked(path, key=key) as stream:
        for number, raw in enumerate(stream, start=1):
            where = f"{path} line {number}"
            record = parse_line(raw, where)
            if record is not None:
                yield where, record


def parse_line(raw: bytes, where: str) -> dict | None:
    """Return the object in one line of a JSONL file; None if the line is blank. A byte order mark is skipped.

    Raises:
        ConfigError: with a one-line message that starts with `where`, if the line is not UTF-8, is not a JSON object,
            or contains a lone surrogate.
    """
    line = decode_line(raw, where).strip()
    if not line:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = "a number is too long, or the nesting too deep"
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg}, column {error.colno}"
        raise ConfigError(f"{where}: not JSON ({detail}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: {type(record).__name__} found; each line must be one JSON object")
    if "\\u" in line and not _is_encodable(record):
        raise ConfigError(f"{where}: contains half a character (a lone \\ud800 to \\udfff); remove it")
    return record


def _is_encodable(record: dict) -> bool:
    """Return whether UTF-8 can encode the record. UTF-8 has no code for a lone surrogate, which JSON can escape."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_field(record: dict, name: str, where: str) -> str:
    """Return the string `record[name]`.

    Raises:
        ConfigError: with a message that names `where` and `name`, if the field is missing, blank or not a string.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in record else f"{value!r:.60}"
        raise ConfigError(f"{where}: `{name}` is {found}; allowed: a non-empty text")
    return value


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Atomically replace the content of the file `path` with `records`, one line of JSON each.

    Raises:
        OSError: with the name `path`, if the file cannot be written.
    """
    with atomic_file(path) as stream:
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
