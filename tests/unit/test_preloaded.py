"""Forks of a process that has imported the packages behave like new processes (tests/preloaded)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preloaded.command import PYTHON

WAITS = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(900)"


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=120, **options)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_has_its_arguments_folder_variables_and_streams(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys, beside\n"
        "print(__name__, sys.argv[1:], os.getcwd(), os.environ['MINE'], sys.stdin.read(), beside.HERE)\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    (tmp_path / "beside.py").write_text("HERE = 5\n")
    done = run(str(script), "a", "b c", cwd=tmp_path, env=os.environ | {"MINE": "7"}, input="text")
    assert done.stdout == f"__main__ ['a', 'b c'] {tmp_path} 7 text 5\n" and done.stderr == "True\n"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "part.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    assert run("-m", "package.part", "x", cwd=tmp_path).stdout == "__main__ ['x']\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('bad')", 1),
        ("raise ValueError('bad')", 1),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import atexit; atexit.register(print, 'bad', flush=True)", 0),
        ("import threading; threading.Timer(0.1, print, ['bad']).start()", 0),
    ],
)
def test_a_program_ends_as_in_a_process_of_its_own(code, expected):
    assert run("-c", code).returncode == expected
    if "bad" in code:
        done = run("-c", code)
        assert "bad" in done.stdout + done.stderr


def test_signals_reach_the_program():
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))"
    process = subprocess.Popen(
        [PYTHON, "-c", WAITS.replace("time;", f"time; {code};", 1)], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=60) == 42


def test_a_program_whose_client_is_killed_ends():
    process = subprocess.Popen([PYTHON, "-c", WAITS], stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    assert is_running(pid) and pid != process.pid
    process.kill()
    process.wait()
    for _ in range(600):
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["-X", "utf8"], {}),
        ([], {"OMP_NUM_THREADS": "3"}),
        ([], {"PYTHONHASHSEED": "5"}),
        ([], {"VLLM_X": "1"}),
    ],
)
def test_a_program_with_another_start_gets_a_process_of_its_own(options, variables):
    code = "import sys; print('torch' in sys.modules, sys.executable)"
    done = run(*options, "-c", code, env=os.environ | variables)
    assert done.stdout == f"False {sys.executable}\n"


def test_a_program_beside_other_sources_gets_a_process_of_its_own(tmp_path):
    (tmp_path / "a2tgpo").mkdir()
    (tmp_path / "a2tgpo" / "__init__.py").write_text("print('other')\n")
    assert run("-c", "import a2tgpo", cwd=tmp_path).stdout == "other\n"
