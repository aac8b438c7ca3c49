"""Write files and folders atomically: write beside the target, sync to disk, then rename.

A failed write, for example on a full disk, leaves no partial file, and its error names the path.
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
    """Open a new file that replaces `path` when the block ends; create its folder if it is missing.

    A reader finds either the old or the new content, even after a power cut. If the block raises, the old content
    stays and the unfinished file is removed.

    Args:
        writer: names this process if several may write `path` at the same time.

    Raises:
        OSError: the file cannot be written; names `path`. Some faults appear only when the file is closed, for
            example on NFS with a full disk.
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
    """Fill a new folder that replaces `path` when the block ends; the old folder is then removed.

    Yields:
        The folder to fill, beside `path`.

    Raises:
        OSError: the folder cannot be written; names `path` or the file within.
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
    """Return the folder in which a new `path` is filled, and the name of the old one while it is replaced."""
    return path.with_name(f".{path.name}{_SUFFIX}"), path.with_name(f".{path.name}.replaced")


def put_folder_in_place(path: Path) -> None:
    """Replace `path` by the folder that was filled beside it."""
    fresh, replaced = folders_beside(path)
    if path.exists():
        os.replace(path, replaced)
    os.replace(fresh, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Sync the folder, so that its new names survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name `path` to an OSError without one, such as a write raises."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy raises some OSErrors with a text only.
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
