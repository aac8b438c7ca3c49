"""Choose the folder of a warm start's model, so that neither an input nor another program's folder is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import is_foreign
from a2tgpo.io.errors import ConfigError, require

MARKER = "warmstart.json"
"""Name of a file that a warm start writes next to its model. The file contains the settings of the warm start."""


def target_of(config: RunConfig) -> Path:
    """Return the folder to which the warm start writes its model. Symbolic links are resolved."""
    return Path(config.model.path).resolve()


def folder_of(config: RunConfig) -> Path:
    """Return the folder of the warm start's metrics and checkpoints."""
    return Path(config.run.root) / f"{config.run.name}-warmstart"


def require_target(config: RunConfig) -> None:
    """Raise a `ConfigError` with a one-line message if the warm start must not write to model.path.

    The folder must not be, contain, or lie inside an input of the warm start. If it is not empty, it is
    allowed only if a warm start wrote it.
    """
    settings, given = config.warmstart, config.model.path
    for field in ("source", "demonstrations"):
        require(bool(getattr(settings, field)), f"warmstart.{field}", "", "a path, for a warm start")
    require(not Path(given).is_file(), "model.path", given, "a folder, which a warm start writes")
    target = target_of(config)
    inputs = {
        "warmstart.source": Path(settings.source),
        "warmstart.demonstrations": Path(settings.demonstrations),
        "run.root's folder of this warm start": folder_of(config),
    }
    for key, path in inputs.items():
        place = path.resolve()
        if place.is_relative_to(target) or target.is_relative_to(place) or _is_same(place, target):
            raise ConfigError(
                f"model.path is {given!r}, which a warm start replaces as a whole; allowed: a folder outside "
                f"{key} ({path})"
            )
    if is_foreign(target, MARKER):
        raise ConfigError(
            f"model.path is {given!r}, which a warm start would replace, but it was not written by a warm start "
            f"(it has no {MARKER}); give a new folder, or move this one away"
        )


def _is_same(one: Path, other: Path) -> bool:
    """Return whether both paths lead to the same folder. A bind mount gives a folder a second path."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
