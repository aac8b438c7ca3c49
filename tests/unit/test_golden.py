"""The golden vectors pass, and the tool that runs them finds errors."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def run_tool(directory: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(GOLDEN / "check_golden.py"), str(directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_golden_vectors_are_reproduced_in_float64():
    result = run_tool(GOLDEN, "--tolerance", "1e-9")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("0 past 1e-09") == 4


def test_a_wrong_number_fails_the_check(tmp_path):
    golden = json.loads((GOLDEN / "advantage.json").read_text())
    golden["cases"][0]["expect"][0]["adv"][0] += 1e-6
    (tmp_path / "advantage.json").write_text(json.dumps(golden))
    result = run_tool(tmp_path)
    assert result.returncode == 1 and golden["cases"][0]["name"] in result.stdout


def test_what_cannot_be_checked_is_told_with_another_code(tmp_path):
    for name, text in {"a": '{"schema": "something/else"}', "b": '{"schema": "x"}', "c": "[{}]"}.items():
        (tmp_path / f"{name}.json").write_text(text)
    for folder, lines in ((tmp_path, 3), (tmp_path / "none", 1)):
        result = run_tool(folder)
        errors = result.stderr.splitlines()
        assert (result.returncode, len(errors)) == (2, lines)
        assert all(line.startswith(f"error: {folder}") for line in errors)
