"""The launcher for one machine, with scripts instead of a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SAVES = """\
import pathlib, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
pathlib.Path(sys.argv[1]).touch()
while not told:
    time.sleep(0.05)
time.sleep(1)
sys.exit(75)
"""


def test_sigterm_leaves_the_ranks_time_to_save_and_the_launcher_ends_with_their_code(tmp_path):
    script, started = tmp_path / "saves.py", tmp_path / "started"
    script.write_text(SAVES)
    command = [sys.executable, "a2tgpo/launch/local_ranks.py", "1", str(script), str(started)]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(launcher.pid, signal.SIGTERM)
    _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "Traceback" not in told, told
