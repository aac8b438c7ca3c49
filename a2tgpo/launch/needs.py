"""List what a program needs from its machines besides input files: disk space, and perhaps a GPU or memory for an
engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.profile import ProfileConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import user_files
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.plan.dimensions import ModelDimensions, read_dimensions
from a2tgpo.plan.storage import Kept, checkpoint_bytes, kept_bytes, model_bytes, most_kept


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """The disk space for data that the program will write."""

    key: str
    """The setting that names the folder to which the program writes."""
    folder: Path
    """An existing folder on the disk to which the program writes."""
    num_bytes: float
    what: str
    change: str
    """Advice on how to reduce the need, for a user who cannot free more space on the disk."""


def disk_faults(needs: Sequence[DiskNeed]) -> list[str]:
    """Return a fault for each disk that has too little free space for the sum of the `needs` on that disk."""
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
    """What a program needs from its machines in addition to its input files."""

    disk: tuple[DiskNeed, ...]
    has_engine: bool
    """Whether the program plays rollouts. If so, the program needs GPU memory for an engine, and the search
    server."""


def training_needs(config: RunConfig) -> Needs:
    """Return what the training run of `config` needs from its machines."""
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
    """Return what a warm start needs from its machines.

    The disk must have room for two checkpoints, because the old and the new one exist together for a short time.

    Args:
        config: the configuration that `warmstart.settings.as_planned` returned.
        target: the folder to which the warm start writes its model.
        root: the folder of the warm start's metrics and checkpoints.
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
        num_bytes=model_bytes(config, sizes) if sizes else 0.0,
        what="the exported model",
        change="or choose another model.path",
    )
    return Needs(disk=(checkpoint, model), has_engine=False)


def check_profiling(config: ProfileConfig) -> None:
    """Raise `ConfigError` if the profile needs a GPU and torch sees none."""
    if not config.memory and config.tool == "torch":
        return  # without an import of torch
    import torch

    on_gpu, why = torch.cuda.is_available(), "since torch sees no GPU"
    require(on_gpu or not config.memory, "profile.memory", list(config.memory), f"[] here, {why}")
    require(on_gpu or config.tool == "torch", "profile.tool", config.tool, f"torch here, {why}")


def read_model(config: RunConfig) -> ModelDimensions | None:
    """Return the dimensions of the model, or None if they cannot be read. A later check reports the fault."""
    try:
        return read_dimensions(config.model.path)
    except (ConfigError, OSError):
        return None


def checkpoints_to_come(config: RunConfig) -> Kept:
    """Return how many whole (at least 1) and weights-only checkpoints the run may add to those on disk."""
    most = most_kept(config)
    markers = (Path(config.run.root) / config.run.name / "checkpoints").glob("step_*/complete.json")
    # A checkpoint that was reduced to its weights has no random states.
    are_whole = [(marker.parent / "rng").is_dir() for marker in markers]
    return Kept(
        whole=max(1, most.whole - are_whole.count(True)),
        weights_only=max(0, most.weights_only - are_whole.count(False)),
    )


def existing_folder(path: Path) -> Path:
    """Return `path` if it is a folder, else its nearest parent that is a folder."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def training_inputs(config: RunConfig, *, resume: str) -> dict[str, str]:
    """Return a map from configuration keys to the paths that every rank of a training run must be able to read."""
    paths = {"model.path": config.model.path}
    files = list(config.data.train_files)
    paths |= {"data.train" if len(files) == 1 else f"data.train {file}": file for file in files}
    for name, of_set in config.evaluation.files(config.data.test).items():
        paths[f"evaluation.sets.{name}" if config.evaluation.sets else "data.test"] = of_set.file
    if "search" in config.tools.names:
        if config.search.backend == "bm25":
            paths["search.corpus"] = config.search.corpus
        elif config.search.token_file:
            paths["search.token_file"] = config.search.token_file
    paths |= user_files(config)
    if "judge" in config.reward.names and config.judge.token_file:
        paths["judge.token_file"] = config.judge.token_file
    if resume not in ("auto", "none"):
        paths["--resume"] = resume
    return paths
