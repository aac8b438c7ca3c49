"""Only one evaluation at a time may write to a folder of answers, also if its launcher is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import pytest

from a2tgpo.io.errors import ConfigError

RANK = """
import os, sys, time
from pathlib import Path
import evaluate
folder, gate = map(Path, sys.argv[1:])
evaluate.claim(folder)
(folder / "replica_0.jsonl").write_text(str(os.getpid()))
while not gate.exists():
    time.sleep(0.02)
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
"""


def test_a_rank_that_lost_its_launcher_keeps_the_answers_until_it_ends(tmp_path: Path) -> None:
    folder, gate = tmp_path / "report.partial", tmp_path / "gate"
    log = folder / "replica_0.jsonl"
    path = os.pathsep.join([str(Path(evaluate.__file__).parent), os.environ["PYTHONPATH"]])
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, str(folder), str(gate)], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        while not (log.exists() and log.read_text()):
            assert launcher.poll() is None, "the rank did not start"
            time.sleep(0.02)
        launcher.kill()
        launcher.wait()
        with pytest.raises(ConfigError, match=f"^--out: {folder} is in use by process {log.read_text()} on "):
            evaluate.claim(folder)
    finally:
        gate.touch()
    while (folder / "holder.json").exists():
        time.sleep(0.02)
    evaluate.claim(folder).release()
