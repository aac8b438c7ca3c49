"""Reading JSONL files that a configuration names, with errors that say where."""

import json
from collections.abc import Iterator
from pathlib import Path

from a2tgpo.config.check import ConfigError


def read_json_lines(path: str | Path, *, key: str) -> Iterator[tuple[str, dict]]:
    """Yield (`"FILE line N"`, object) for every line that is not blank.

    Args:
        path: UTF-8 file with one JSON object a line.
        key: what named the file (a configuration key or an option), for the message when it cannot be read.

    Raises:
        ConfigError: one line; the file cannot be read, a line is not UTF-8, not JSON, or not an object.
    """
    try:
        handle = open(path, "rb")  # noqa: SIM115  (closed below; only the opening belongs in this try)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path} ({error.strerror}); give an existing JSONL file"
        ) from None
    with handle:
        try:
            for number, raw in enumerate(handle, start=1):
                where = f"{path} line {number}"
                record = _parse(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where)
                if record is not None:
                    yield where, record
        except OSError as error:
            raise ConfigError(f"{key}: cannot read {path} ({error.strerror})") from None


def _parse(raw: bytes, where: str) -> dict | None:
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    if not line:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = "a number too long, or nested too deep"
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg}, column {error.colno}"
        raise ConfigError(f"{where}: not JSON ({detail}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: {type(record).__name__} found; each line must be one JSON object")
    return record


def text_field(record: dict, name: str, where: str) -> str:
    """The text `record[name]`; ConfigError naming `where` and `name` if it is missing, no text or blank."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in record else f"{value!r:.60}"
        raise ConfigError(f"{where}: `{name}` is {found}; allowed: a non-empty text")
    return value
