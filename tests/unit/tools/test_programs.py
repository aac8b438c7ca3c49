"""Every program answers --help quickly, because it parses its arguments before it imports large libraries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    path
    for folder in ("launch", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in (text := path.read_text(encoding="utf-8")) and "parser" in text
]
HEAVY = ("torch", "vllm", "transformers", "megatron", "matplotlib")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_is_printed_before_a_large_library_is_imported(program):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(program), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, flags=re.MULTILINE))
    assert not imported & set(HEAVY)
