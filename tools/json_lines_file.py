"""Write JSONL files atomically."""

import json
from collections.abc import Iterable
from pathlib import Path

from a2tgpo.atomic_file import atomic_file


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSONL atomically; an OSError names `path`."""
    with atomic_file(path) as stream:
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
