"""Commands of the documentation, so that tests run what a page tells its reader to type."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def documented(page: str, part: str) -> str:
    """Return the first line of `page` that starts with `launch/` and contains `part`."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("launch/") and part in line)
