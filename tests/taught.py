"""The taught tiny model, which all processes of a test session share."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import tempfile
from pathlib import Path

VARIABLE = "TAUGHT_MODEL"
"""The environment variable with the folder that the session shares."""


def share() -> tempfile.TemporaryDirectory | None:
    """Let this process and those that it starts share a folder. Return the folder, or None if they share one already.

    The folder must exist until the session ends.
    """
    if VARIABLE in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="taught-")
    os.environ[VARIABLE] = folder.name
    return folder


@functools.cache
def taught_folder() -> str:
    """Return a folder with the model of `save_taught`. The first process that asks for it makes it, and nothing may
    change it.
    """
    from tiny_models import save_taught  # only here, because it imports torch

    folder = share()
    if folder is not None:  # outside a test session
        atexit.register(folder.cleanup)
    shared = Path(os.environ[VARIABLE])
    model = shared / "model"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not model.exists():
            Path(save_taught(shared / "unfinished")).rename(model)
    return str(model)
