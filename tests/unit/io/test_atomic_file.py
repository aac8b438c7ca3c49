"""A file is written in full or not at all, and an error names the file that cannot be written."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from a2tgpo.io.atomic_file import atomic_file, atomic_folder, is_foreign, write_json, write_text

ROOT = Path(__file__).parents[3]


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    write_text(path, "old")
    with atomic_file(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    write_json(path, {"a": "\u00e9"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "\u00e9"\n}\n'


def test_a_folder_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(path) as fresh:
            (fresh / name).write_text("")
            assert not (path / name).exists()
    assert [entry.name for entry in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_foreign_if_it_has_files_but_no_marker(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert not is_foreign(folder, "marker"), "there is no folder"
    folder.mkdir()
    assert not is_foreign(folder, "marker"), "the folder is empty"
    (folder / "notes").write_text("")
    assert is_foreign(folder, "marker")
    (folder / "marker").write_text("")
    assert not is_foreign(folder, "marker")


@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_what_fails_leaves_the_old_and_nothing_beside_it(make, tmp_path: Path) -> None:
    path = tmp_path / "made"
    write_text(path, "old") if make is atomic_file else path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), make(path):
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OSError, match="No space") as caught, make(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path) and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError) as caught, make(path):
        Path("/nowhere/of/another/name").read_text()  # this error keeps its own file name
    assert caught.value.filename == "/nowhere/of/another/name"


def test_a_disk_that_is_full_is_named_by_every_writer(tmp_path: Path) -> None:
    """A limit on the size of files fails like a full disk: during the write, without a file name."""
    code = f"""
import resource, sys
from pathlib import Path
from a2tgpo.record.rollout_files import write_part
from a2tgpo.metrics.writer import MetricWriter
from a2tgpo.io.json_lines import write_lines
from a2tgpo.record.rollouts_page import write_page
folder = Path({str(tmp_path)!r})
writer = MetricWriter(folder, total_steps=9)
writer.log(1, {{"a": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import secrets
record = {{"text": secrets.token_hex(9000)}}
writes = {{
    "metrics.jsonl": lambda: writer._jsonl.write(2, {{f"m{{i}}": 0.1 for i in range(999)}}),
    "replica_0_of_1.jsonl.zst": lambda: write_part([record], folder / "replica_0_of_1.jsonl.zst"),
    "lines.jsonl": lambda: write_lines(folder / "lines.jsonl", [record] * 9),
    "page.html": lambda: write_page(folder / "page.html", "x", {{}}, None),
}}
for name, write in writes.items():
    try:
        write()
    except OSError as error:
        print(name, error.filename == str(folder / name), error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    names = ["metrics.jsonl", "replica_0_of_1.jsonl.zst", "lines.jsonl", "page.html"]
    assert done.stdout.splitlines() == [f"{name} True File too large" for name in names], done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1.0}\n'
    left = {entry.name for entry in tmp_path.iterdir()} - {"metrics.jsonl", "tensorboard"}
    assert not left
