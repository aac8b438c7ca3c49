"""Rules for tests: names are short, and no assertion reads the wall clock."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
LONGEST_NAME = 80
CLOCKS = {"time.monotonic", "time.perf_counter", "time.time"}


def nodes_of(kind):
    """Yield (file, node) for each syntax node of one kind in the tests."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path.relative_to(TESTS), node


def test_the_name_of_a_test_has_at_most_80_characters():
    names = [(path, node.name) for path, node in nodes_of(ast.FunctionDef) if node.name.startswith("test_")]
    assert len(names) > 1000
    assert not [(path, name) for path, name in names if len(name) > LONGEST_NAME]


def test_no_assertion_reads_the_wall_clock():
    """Tests must not fail on a busy machine, so they count events or move their own clock."""
    assert not [
        (path, node.lineno)
        for path, node in nodes_of(ast.Assert)
        if any(
            isinstance(part, ast.Call) and ast.unparse(part.func) in CLOCKS for part in ast.walk(node.test)
        )
    ]
