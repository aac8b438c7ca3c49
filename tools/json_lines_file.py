"""Writing JSONL files, complete or not at all."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSONL, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
