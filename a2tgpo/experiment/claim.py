"""Claim an experiment's folder: lock it, check that it is the same experiment, and record the start."""

from __future__ import annotations

from pathlib import Path

from a2tgpo.config.check import ConfigError
from a2tgpo.config.run import RunConfig
from a2tgpo.experiment.rules import Rules
from a2tgpo.experiment.starts import record_start, require_same
from a2tgpo.folder_lock import FolderLock


def claim(
    folder: Path, config: RunConfig, rules: Rules, *, begins_anew: bool, accept: bool, done: str
) -> FolderLock:
    """Create the folder, lock it until the program ends, and record what this start runs with; call in one process.

    Args:
        begins_anew: rename an existing folder to NAME.previous_N first.
        accept: continue despite all changes since the last start.
        done: the experiment's progress, in a few words; empty: nothing was trained, so nothing is compared.

    Raises:
        ConfigError: one line; the folder cannot be written, is locked, or holds another experiment.
    """
    try:
        if begins_anew and folder.exists():
            _set_aside(folder)
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


def _set_aside(folder: Path) -> None:
    lock = FolderLock(folder)  # fails if a run is still using the folder
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous_{number}")).exists():
        number += 1
    lock.release()
    folder.rename(aside)
