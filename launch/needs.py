"""A program's needs of the machines, apart from its input files: disk space, and an engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.check import ConfigError
from a2tgpo.config.run import RunConfig

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
BYTES_PER_PARAMETER = {"bfloat16": 14, "float32": 12}
"""Bytes per parameter of a checkpoint: weights, two moments, and float32 weights beside those in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """Data that will be written."""

    key: str
    """The setting that names the folder."""
    folder: Path
    """An existing folder on the same disk."""
    num_bytes: float
    what: str
    change: str
    """How to reduce the need, as an alternative to more disk space."""


def disk_faults(needs: Sequence[DiskNeed]) -> list[str]:
    """Return faults of the disks that lack space for `needs`; needs on one disk are added up."""
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
    """A program's needs of the machines, apart from its input files."""

    disk: tuple[DiskNeed, ...]
    has_engine: bool
    """Whether it plays, so that the engine needs its share of the GPUs, and the search server must answer."""


def training_needs(config: RunConfig) -> Needs:
    """Return the needs of a training run."""
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
    """Return a warm start's needs, from its planning configuration: briefly two checkpoints, and its model.

    Args:
        target: the folder of the model to write.
        root: the warm start's folder.
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
    """Return the size of one checkpoint; 0 if the model cannot be read, which is reported when it is loaded."""
    return saved_parameters(config) * BYTES_PER_PARAMETER[config.model.dtype]


def saved_parameters(config: RunConfig) -> float:
    """Return the model's number of parameters; 0 if it cannot be read."""
    from a2tgpo.plan.dimensions import read_dimensions
    from a2tgpo.plan.parameters import checkpoint_parameters

    try:
        return checkpoint_parameters(read_dimensions(config.model.path))
    except (ConfigError, OSError):
        return 0.0


def copies_to_come(config: RunConfig) -> int:
    """Return how many checkpoints will join the existing ones: a new one is complete before the oldest goes."""
    planned = 1 + (config.run.steps - 1) // config.checkpoint.every if config.checkpoint.every else 1
    best = config.checkpoint.best_by != "none"
    there = len(list((Path(config.run.root) / config.run.name / "checkpoints").glob("step_*/complete.json")))
    return max(1, min(config.checkpoint.keep + 1 + best, planned) - there)


def existing_folder(path: Path) -> Path:
    """Return `path`, or its nearest existing parent."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
