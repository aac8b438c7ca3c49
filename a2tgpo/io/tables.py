"""Write rows as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Write `rows` as CSV with a header. The columns are in the order in which their names first occur in `rows`.

    A cell is empty if the row's value is missing or None.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Every `|` within a cell is escaped."""
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, *rows)
    ]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
