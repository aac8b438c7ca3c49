"""Write files and folders atomically: write a new file beside the target, sync it to disk, then rename it.

If a write fails, no partial file remains, and the error names the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SUFFIX = ".unfinished"


@contextlib.contextmanager
def atomic_file(path: Path, *, writer: str = "") -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends. Missing parent folders are created.

    A reader finds either the old or the new content, even after a power cut. If the block raises, the old file stays.

    Args:
        writer: a name that only this process uses. It is needed if several processes may write `path` at once.

    Raises:
        OSError: with `path` as its file name, if the file cannot be written. Some faults, such as a full disk of an
            NFS server, appear only when the file is closed.
    """
    fresh = path.with_name(f"{path.name}{writer}{_SUFFIX}")
    with naming(path), _removed_on_failure(fresh):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a new folder that replaces `path` when the block ends, and then remove the old folder.

    Yields:
        The new folder, which the block fills. It has the same parent folder as `path`.

    Raises:
        OSError: with the name of the folder or of a file in it, if the folder cannot be written.
    """
    fresh, replaced = folders_beside(path)
    with naming(path), _removed_on_failure(fresh):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (fresh, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        put_folder_in_place(path)


def folders_beside(path: Path) -> tuple[Path, Path]:
    """Return the paths of two folders beside `path`: one for its new content, and one for its old content."""
    return path.with_name(f".{path.name}{_SUFFIX}"), path.with_name(f".{path.name}.replaced")


def is_foreign(path: Path, marker: str) -> bool:
    """Return whether the folder `path` has files, but not the file `marker`, which every folder of its kind has.

    Such a folder must not be replaced, because something else wrote it.
    """
    return path.is_dir() and any(path.iterdir()) and not (path / marker).is_file()


def put_folder_in_place(path: Path) -> None:
    """Replace the folder `path` with the first folder of `folders_beside(path)`, which the caller has filled."""
    fresh, replaced = folders_beside(path)
    if path.exists():
        os.replace(path, replaced)
    os.replace(fresh, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Atomically replace the content of the file `path` with `text`, encoded as UTF-8."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Atomically replace the content of the file `path` with `content`, as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Sync the folder to disk, so that new names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name `path` to an OSError that the block raises without a file name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy raises OSErrors that have a message but no error number.
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _removed_on_failure(fresh: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if fresh.is_dir():
                shutil.rmtree(fresh)
            else:
                fresh.unlink(missing_ok=True)
        raise
