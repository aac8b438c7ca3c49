"""A program's needs of the machines, apart from its input files: disk space, and an engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.dimensions import ModelDimensions, read_dimensions
from a2tgpo.plan.storage import Kept, checkpoint_bytes, kept_bytes, most_kept, weights_bytes


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
            others = " after the other files written there" if before else ""
            faults.append(
                f"{need.key}: {need.folder} has {max(0.0, free) / 1e9:.3g} GB left{others}, {need.what} need "
                f"{need.num_bytes / 1e9:.3g} GB; make room, {need.change}"
            )
    return faults


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A program's needs of the machines, apart from its input files."""

    disk: tuple[DiskNeed, ...]
    has_engine: bool
    """Whether the program plays rollouts, so that the engine needs its share of the GPUs and the search server must
    answer.
    """


def training_needs(config: RunConfig) -> Needs:
    """Return the needs of a training run."""
    model = read_model(config)
    return Needs(
        disk=(
            DiskNeed(
                key="run.root",
                folder=existing_folder(Path(config.run.root) / config.run.name),
                num_bytes=kept_bytes(config, model, checkpoints_to_come(config)) if model else 0.0,
                what="the checkpoints",
                change="choose another run.root, or lower checkpoint.keep or checkpoint.keep_gb",
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
    sizes = read_model(config)
    checkpoint = DiskNeed(
        key="run.root",
        folder=existing_folder(root),
        num_bytes=2 * checkpoint_bytes(config, sizes) if sizes else 0.0,
        what="two checkpoints",
        change="or choose another run.root",
    )
    model = DiskNeed(
        key="model.path",
        folder=existing_folder(target),
        num_bytes=weights_bytes(config, sizes) if sizes else 0.0,
        what="the exported model",
        change="or choose another model.path",
    )
    return Needs(disk=(checkpoint, model), has_engine=False)


def read_model(config: RunConfig) -> ModelDimensions | None:
    """Return the model's sizes, or None if the model cannot be read; loading the model later reports the error."""
    try:
        return read_dimensions(config.model.path)
    except (ConfigError, OSError):
        return None


def checkpoints_to_come(config: RunConfig) -> Kept:
    """Return how many checkpoints will join the existing ones: at least the next one."""
    most = most_kept(config)
    markers = (Path(config.run.root) / config.run.name / "checkpoints").glob("step_*/complete.json")
    # A checkpoint reduced to its weights has no random states.
    are_whole = [(marker.parent / "rng").is_dir() for marker in markers]
    return Kept(
        whole=max(1, most.whole - are_whole.count(True)),
        weights_only=max(0, most.weights_only - are_whole.count(False)),
    )


def existing_folder(path: Path) -> Path:
    """Return `path`, or its nearest existing parent."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def training_inputs(config: RunConfig, *, resume: str) -> dict[str, str]:
    """Return the paths that every rank must be able to read, by configuration key."""
    paths = {"model.path": config.model.path, "data.train": config.data.train, "data.test": config.data.test}
    if "search" in config.tools.names:
        if config.search.backend == "bm25":
            paths["search.corpus"] = config.search.corpus
        elif config.search.token_file:
            paths["search.token_file"] = config.search.token_file
    if resume not in ("auto", "none"):
        paths["--resume"] = resume
    return paths
