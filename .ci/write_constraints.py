"""Write the versions that pip resolved as a constraints file: `make constraints-cpu`, `make constraints-gpu`.

python .ci/write_constraints.py REPORT CONSTRAINTS [LEFT_OUT ...]        REPORT: of pip install --dry-run --report
"""

import json
import re
import sys
from pathlib import Path

HEAD = """\
# The version of every package that `make {setup}` installs: what pip resolved of setup.py's {kind} and dev sets.
# Written by `make constraints-{kind}`; to take newer versions, run it again.
"""


def main(report: str, constraints: str, *left_out: str) -> None:
    found = [package["metadata"] for package in json.loads(Path(report).read_text())["install"]]
    pins = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in found}
    for name in ("a2tgpo", *left_out):
        del pins[name]
    # A build's own suffix (2.13.0+cpu) exists on one index only; the version without it allows any build.
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(pins.items())]
    kind = Path(constraints).stem.rpartition("-")[2]
    head = HEAD.format(kind=kind, setup="setup" if kind == "cpu" else f"setup-{kind}")
    Path(constraints).write_text(head + "".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
