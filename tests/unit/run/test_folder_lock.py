"""A second start in a run folder is refused only while the first process lives, on this or another machine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.run import folder_lock
from a2tgpo.run.folder_lock import FILE, FolderLock, Holder, this_process

ROOT = Path(__file__).parents[3]
HOLD = "import sys; from pathlib import Path; from a2tgpo.run.folder_lock import FolderLock\n"
HOLD += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.readline()"


def start(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n", process.stderr and process.stderr.read()
    return process


def write_holder(folder: Path, beat: int = 0, **changes: object) -> Holder:
    holder = dataclasses.replace(this_process(), **changes)  # type: ignore[arg-type]
    (folder / FILE).write_text(json.dumps({**dataclasses.asdict(holder), "beat": beat}))
    return holder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(folder_lock, "SILENCE_S", 2.0)
    monkeypatch.setattr(folder_lock, "SETTLE_S", 0.1)


def test_a_second_start_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    first = start(tmp_path)
    with pytest.raises(ConfigError) as caught:
        FolderLock(tmp_path)
    message = str(caught.value)
    assert f"run.name: {tmp_path} is in use by process {first.pid} on {os.uname().nodename}" in message
    assert "which has held it for 0 min; end that run first" in message and "\n" not in message
    first.communicate("\n", timeout=60)
    assert not (tmp_path / FILE).exists(), "a process that ends gives the folder back"
    FolderLock(tmp_path).release()
    assert not (tmp_path / FILE).exists()


def test_a_killed_process_keeps_no_folder_nor_does_one_that_is_not_buried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path)
    first.send_signal(signal.SIGKILL)
    while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    monkeypatch.setattr(folder_lock, "SILENCE_S", 9999.0)  # a start would wait this long for a live process
    lock = FolderLock(tmp_path)  # the zombie process still exists
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()
    first.communicate()


def test_a_process_may_hold_its_folder_again_and_numbers_of_processes_come_round(tmp_path: Path) -> None:
    locks = [FolderLock(tmp_path), FolderLock(tmp_path)]
    for lock in locks:
        lock.release()
    write_holder(tmp_path, pid=os.getppid(), started=1)  # another process has this number now
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_requeued_job_is_not_locked_out_by_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_holder(tmp_path, host="node7", boot="of node7", slurm_job="88")
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(folder_lock, "SILENCE_S", 9999.0)
    FolderLock(tmp_path).release()
    # Two steps of one job that was not requeued are two starts.
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setattr(folder_lock, "SILENCE_S", 2.0)
    write_holder(tmp_path, host="node7", boot="of node7", slurm_job="88", slurm_restarts=1)
    with (
        beating(tmp_path, host="node7", boot="of node7", slurm_job="88"),
        pytest.raises(ConfigError, match="job 88"),
    ):
        FolderLock(tmp_path)


class beating:
    """A live holder of the folder on another machine."""

    def __init__(self, folder: Path, **changes: object):
        self._folder, self._changes, self._end = folder, changes, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        beat = 0
        while not self._end.wait(0.1):
            beat += 1
            write_holder(self._folder, beat, **self._changes)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_a_holder_on_another_machine_is_refused_while_it_shows_that_it_lives(tmp_path: Path, caplog) -> None:
    write_holder(tmp_path, host="node7", boot="of node7", pid=4711)
    refused = pytest.raises(ConfigError, match="in use by process 4711 on node7, which has held it for 0 min")
    with beating(tmp_path, host="node7", boot="of node7", pid=4711), refused:
        FolderLock(tmp_path)
    lock = FolderLock(tmp_path)  # it shows no sign of life any more
    assert "waiting 2 s for a sign of life" in caplog.text
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_file_that_names_nobody_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_of_two_starts_that_find_the_same_dead_holder_one_goes_on(tmp_path: Path) -> None:
    write_holder(tmp_path, pid=os.getppid(), started=1)
    code = HOLD + "; lock.release()"
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = []
    for process in starts:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    errors = [process.communicate("\n", timeout=60)[1] for process in starts]
    assert said.count("held\n") == 1, errors
    assert sum("is in use by process" in error for error in errors) == 2


def test_a_process_whose_folder_was_taken_ends(tmp_path: Path) -> None:
    code = HOLD.replace("lock =", "import a2tgpo.run.folder_lock as f; f.BEAT_S = 0.1; lock =")
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    write_holder(tmp_path, host="node7", boot="of node7", pid=4711)
    assert first.wait(timeout=60) == 3
    assert first.stderr is not None
    assert "was taken over by process 4711 on node7, which saw no sign of life" in first.stderr.read()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 4711
