"""Write the versions that pip resolved as a constraints file: `make constraints-gpu`.

python .ci/write_constraints.py REPORT CONSTRAINTS        REPORT: of pip install --dry-run --report
"""

import json
import re
import sys
from pathlib import Path

HEAD = """\
# The version of every package that `make setup-gpu` installs: what pip resolved of setup.py's gpu and dev sets.
# Written by `make constraints-gpu`; to take newer versions, run it again.
"""


def main(report: str, constraints: str) -> None:
    found = [package["metadata"] for package in json.loads(Path(report).read_text())["install"]]
    pins = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in found}
    del pins["a2tgpo"]
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    Path(constraints).write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
