"""Writing JSONL files, complete or not at all."""

import json
from collections.abc import Iterable
from pathlib import Path

from a2tgpo.atomic_file import atomic_file


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSONL, complete or not at all; OSError that names `path` where it cannot be written."""
    with atomic_file(path) as stream:
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
