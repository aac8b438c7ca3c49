"""Write files and folders atomically: write a new file beside the target, sync it to disk, then rename it.

If a write fails, for example because the disk is full, no partial file remains, and the error names the path.
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
    """Open a new file that replaces `path` when the block ends. If the folder of `path` is missing, create it.

    A reader finds either the old or the new content, even after a power cut. If the block raises, the old content
    stays and the unfinished file is removed.

    Args:
        writer: a name of this process, needed if several processes may write `path` at the same time.

    Raises:
        OSError: the file cannot be written; the error names `path`. Some faults appear only when the file is closed,
            for example when an NFS server's disk is full.
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
        The new folder, which the block fills. It lies in the same parent folder as `path`.

    Raises:
        OSError: the folder cannot be written; the error names `path` or the file in it.
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
    """Return two folders beside `path`: one in which its new content is prepared, and one to which the old `path` is
    moved during the replacement.
    """
    return path.with_name(f".{path.name}{_SUFFIX}"), path.with_name(f".{path.name}.replaced")


def put_folder_in_place(path: Path) -> None:
    """Replace the folder `path` by the folder in which the caller has prepared its new content.

    `folders_beside` returns the name of this folder.
    """
    fresh, replaced = folders_beside(path)
    if path.exists():
        os.replace(path, replaced)
    os.replace(fresh, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` atomically by one that contains `text` in UTF-8."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace the file `path` atomically by one that contains `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Sync the folder to disk, so that files renamed or created in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """If the block raises an OSError without a file name, as writing to an open file does, add the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy raises some OSErrors that have a text but no error number.
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
