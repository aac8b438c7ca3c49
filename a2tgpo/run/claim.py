"""Claim the folder of an experiment: lock it, check that it contains the same experiment, and record the start."""

from __future__ import annotations

import glob
import logging
import shutil
from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.run.folder_lock import FolderLock
from a2tgpo.run.rules import Rules
from a2tgpo.run.starts import record_start, require_same

logger = logging.getLogger(__name__)


def claim(
    folder: Path, config: RunConfig, rules: Rules, *, begins_anew: bool, accept: bool, done: str
) -> FolderLock:
    """Create the folder, lock it until the program ends, and record this start. Only one process may call this.

    Args:
        begins_anew: whether the experiment begins anew. If so, an existing folder is first renamed to
            NAME.previous_N. Only the newest `checkpoint.keep_previous` renamed folders are kept.
        accept: whether to continue despite changes since the last start.
        done: the progress of the experiment, in a few words. It is empty if nothing was trained yet, and
            this start is then not compared with the last one.

    Raises:
        ConfigError: with a one-line message, if the folder cannot be written, is locked, or contains another
            experiment.
    """
    try:
        if begins_anew and folder.exists():
            _set_aside(folder, keep=config.checkpoint.keep_previous)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        if done and not begins_anew:
            require_same(folder, config, rules, accept=accept, done=done)
        record_start(folder, config)
    except OSError as error:
        raise ConfigError(
            f"run.root: {folder} cannot be written ({error.strerror}); choose another run.root"
        ) from None
    return lock


def _set_aside(folder: Path, *, keep: int) -> None:
    """Rename `folder` to NAME.previous_N, and keep only the newest `keep` of the renamed folders; 0 keeps all."""
    lock = FolderLock(folder)  # raises ConfigError if a run is still using the folder
    stem = f"{folder.name}.previous_"
    numbers = sorted(
        int(path.name.removeprefix(stem))
        for path in folder.parent.glob(f"{glob.escape(stem)}*")
        if path.name.removeprefix(stem).isdecimal()
    )
    numbers.append(numbers[-1] + 1 if numbers else 1)
    lock.release()
    folder.rename(folder.with_name(f"{stem}{numbers[-1]}"))
    sizes = {number: _size_of(folder.with_name(f"{stem}{number}")) for number in numbers}
    while keep and len(sizes) > keep:
        oldest = min(sizes)
        logger.warning(
            "removed %s (%.3g GB): checkpoint.keep_previous is %d",
            folder.with_name(f"{stem}{oldest}"),
            sizes.pop(oldest) / 1e9,
            keep,
        )
        shutil.rmtree(folder.with_name(f"{stem}{oldest}"))
    logger.warning(
        "set %s aside as %s%d (%.3g GB; all %sN together: %.3g GB)",
        folder,
        stem,
        numbers[-1],
        sizes[numbers[-1]] / 1e9,
        stem,
        sum(sizes.values()) / 1e9,
    )


def _size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
