"""What a program takes of the machines, besides the files that it reads: room on disks, and an engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.check import ConfigError
from a2tgpo.config.run import RunConfig

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
BYTES_PER_PARAMETER = {"bfloat16": 14, "float32": 12}
"""Of a checkpoint: weights, two moments, and float32 weights beside those in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """What is going to be written."""

    key: str
    """The setting that names the place."""
    folder: Path
    """An existing one on its disk."""
    num_bytes: float
    what: str
    change: str
    """What makes it fit, besides room on the disk."""


def disk_faults(needs: Sequence[DiskNeed]) -> list[str]:
    """What is wrong with the space that is left where `needs` are written; those on one disk share it."""
    faults = []
    taken: dict[int, float] = {}
    for need in needs:
        device = need.folder.stat().st_dev
        before = taken.get(device, 0.0)
        taken[device] = before + need.num_bytes
        free = shutil.disk_usage(need.folder).free - before
        if need.num_bytes and free < need.num_bytes:
            beside = " beside what else is written there" if before else ""
            faults.append(
                f"{need.key}: {need.folder} has {max(0.0, free) / 1e9:.3g} GB left{beside}, {need.what} take "
                f"{need.num_bytes / 1e9:.3g} GB; make room, {need.change}"
            )
    return faults


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a program takes of the machines, besides the files that it reads."""

    disk: tuple[DiskNeed, ...]
    has_engine: bool
    """It plays: the engine has its share of the cards, and the search server must answer."""


def training_needs(config: RunConfig) -> Needs:
    """Of a training run."""
    return Needs(
        disk=(
            DiskNeed(
                key="run.root",
                folder=existing_folder(Path(config.run.root) / config.run.name),
                num_bytes=checkpoint_bytes(config) * copies_to_come(config),
                what="the checkpoints to come",
                change="choose another run.root, or lower checkpoint.keep",
            ),
        ),
        has_engine=True,
    )


def warm_start_needs(config: RunConfig, *, target: Path, root: Path) -> Needs:
    """Of a warm start with the configuration that it is planned by: two checkpoints for a moment, and its model.

    Args:
        target: the folder of the model that it writes.
        root: its own folder.
    """
    checkpoint = DiskNeed(
        key="run.root",
        folder=existing_folder(root),
        num_bytes=2 * checkpoint_bytes(config),
        what="two checkpoints",
        change="or choose another run.root",
    )
    model = DiskNeed(
        key="model.path",
        folder=existing_folder(target),
        num_bytes=saved_parameters(config) * ELEMENT_BYTES[config.model.dtype],
        what="the model that is written",
        change="or choose another model.path",
    )
    return Needs(disk=(checkpoint, model), has_engine=False)


def checkpoint_bytes(config: RunConfig) -> float:
    """Size of one checkpoint; 0 where the model cannot be read, which is told when it is."""
    return saved_parameters(config) * BYTES_PER_PARAMETER[config.model.dtype]


def saved_parameters(config: RunConfig) -> float:
    """Parameters of the model; 0 where it cannot be read."""
    from a2tgpo.plan.dimensions import read_dimensions
    from a2tgpo.plan.parameters import checkpoint_parameters

    try:
        return checkpoint_parameters(read_dimensions(config.model.path))
    except (ConfigError, OSError):
        return 0.0


def copies_to_come(config: RunConfig) -> int:
    """Checkpoints that will stand beside those already there: a new one is whole before the oldest goes."""
    planned = 1 + (config.run.steps - 1) // config.checkpoint.every if config.checkpoint.every else 1
    best = config.checkpoint.best_by != "none"
    there = len(list((Path(config.run.root) / config.run.name / "checkpoints").glob("step_*/complete.json")))
    return max(1, min(config.checkpoint.keep + 1 + best, planned) - there)


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
