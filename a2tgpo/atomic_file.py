"""Files and folders that appear whole or not at all: written beside their place, made durable, then renamed.

What cannot be written, for want of space for example, is removed again and named in the error.
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
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends; its folder is made if it is missing.

    A reader, also one after a power cut, finds the old content or the new. Where the block raises, the old content
    stays and nothing is left beside it.

    Raises:
        OSError: it cannot be written; names `path`. Also raised for a fault that only shows when the file is closed,
            as on NFS with a full disk.
    """
    fresh = path.with_name(path.name + _SUFFIX)
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
    """A new folder that takes the place of `path` when the block ends; what was there is then removed.

    Yields:
        The folder to fill, beside `path`.

    Raises:
        OSError: it cannot be written; names `path`, or the file in it.
    """
    fresh, replaced = path.with_name(f".{path.name}{_SUFFIX}"), path.with_name(f".{path.name}.replaced")
    with naming(path), _removed_on_failure(fresh):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (fresh, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        if path.exists():
            os.replace(path, replaced)
        os.replace(fresh, path)
        sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, as `atomic_file` does."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as JSON for people to read, as `atomic_file` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError without a file's name, as writing raises it, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy raises some with a text only.
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
