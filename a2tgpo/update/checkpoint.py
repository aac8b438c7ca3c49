"""Checkpoints: everything a run needs to go on as if it had never stopped.

`ROOT/step_N/` holds `sharded/`, Megatron's torch_dist checkpoint of model and optimizer, `rng/rank_R.pt` with
each rank's random state, `state.json` with the learning rate schedule, the layout, the model's architecture and the
caller's own values, and files of the caller's. Nothing in it can run code when it is read. It is written
(`checkpoint_writer.py`) as `step_N.tmp` and renamed once `complete.json`, the list of its files with their sizes and
checksums, is in place: a folder without a matching list is not a checkpoint.

Every rank sees the same file system, and every rank calls every function here that is not private, unless it says
otherwise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PretrainedConfig

from a2tgpo.atomic_file import sync_folder, write_text
from a2tgpo.error_line import first_line
from a2tgpo.model.hf_config import architecture_of
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.rng import set_rng_state
from a2tgpo.update.optimizer import LearningRateSchedule
from a2tgpo.update.optimizer_shards import is_distributed
from a2tgpo.update.sharded_state import load_sharded, load_sharded_weights

logger = logging.getLogger(__name__)

MARKER = "complete.json"
STATE = "state.json"
SHARDED = "sharded"
_STEP_FOLDER = re.compile(r"step_(\d+)")


def drop_old(root: str | Path, *, keep: int, keep_every: int, spare: int | None) -> None:
    """Remove all but the `keep` newest checkpoints under `root`; one rank calls this.

    Not counted and not removed: that of step `spare`, and those whose step is a multiple of `keep_every` (0: none).
    """
    steps = [step for step in steps_in(Path(root)) if step != spare and (not keep_every or step % keep_every)]
    for old in steps[keep:]:
        shutil.rmtree(Path(root) / f"step_{old}")


def set_aside_after(root: str | Path, step: int) -> None:
    """Move checkpoints of later steps to `root/dropped_N/`, since a run that goes on from `step` has another future.

    Left in place they would count as the newest: resumed from, and kept while those of the new future are removed.
    """
    root = Path(root)
    if dist.get_rank() == 0 and (later := [old for old in steps_in(root) if old > step]):
        number = 1
        while (aside := root / f"dropped_{number}").exists():
            number += 1
        aside.mkdir()
        for old in later:
            (root / f"step_{old}").rename(aside / f"step_{old}")
        logger.warning("checkpoints after step %d are set aside in %s", step, aside)
    dist.barrier()


def load(
    path: str | Path, *, policy: Policy, optimizer: Any, schedule: LearningRateSchedule
) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state, schedule and random states in place.

    The layout may differ from the one that saved it; random states are then left as they are, with a warning,
    since they belong to ranks.

    Returns:
        The `state` given to `CheckpointWriter.start`.

    Raises:
        ValueError: one line; `path` is not a complete checkpoint of this program, or one of another model.
    """
    path = Path(path)
    _require_complete(path)
    record = read_record(path)
    rng = None
    require_same_model(path, record, policy.hf_config)
    _require_same_optimizer(path, record, optimizer)
    if record["layout"] == record_of(policy)["layout"]:
        try:
            rng = torch.load(path / rng_file(policy.groups.rank), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"{path / rng_file(policy.groups.rank)} holds no random states") from error
    elif policy.groups.rank == 0:
        logger.warning("%s was saved with another layout; random states are not restored", path)
    with _told_as_another_model(path):
        load_sharded(path / SHARDED, policy, optimizer)
    schedule.load_state_dict(record["schedule"])
    if rng is not None:
        set_rng_state(_from_plain(rng))
    return record["state"]


def load_weights(path: str | Path, policy: Policy) -> None:
    """Put only a checkpoint's weights in place, saved by any layout.

    Raises:
        ValueError: one line; `path` is not a complete checkpoint, or one of another model.
    """
    path = Path(path)
    _require_complete(path)
    require_same_model(path, read_record(path), policy.hf_config)
    with _told_as_another_model(path):
        load_sharded_weights(path / SHARDED, policy)


def require_same_model(path: Path, record: dict[str, Any], hf_config: PretrainedConfig) -> None:
    """ValueError, one line, if the checkpoint with this record comes from another model; one process may call this.

    Shapes do not tell: a vocabulary of another size may be padded to fit, a key that only one side has is left out.
    A checkpoint without the record, from before it was kept, is let through.
    """
    mine = architecture_of(hf_config)
    saved = record.get("model", mine)
    differing = [
        f"{name} {saved.get(name)} (here {mine.get(name)})"
        for name in sorted(mine.keys() | saved.keys())
        if saved.get(name) != mine.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} does not fit the model at model.path: it was saved from one with {', '.join(differing)}; give "
            "the model.path of its run"
        )


def _require_same_optimizer(path: Path, record: dict[str, Any], optimizer: Any) -> None:
    """ValueError, one line, if the state on disk is the other kind of optimizer's; older checkpoints do not say."""
    mine = is_distributed(optimizer)
    saved = record.get("distributed_optimizer", mine)
    if saved != mine:
        raise ValueError(
            f"{path} was saved with update.distributed_optimizer={str(saved).lower()}, and its optimizer state "
            "can be loaded so only; set it"
        )


@contextlib.contextmanager
def _told_as_another_model(path: Path) -> Iterator[None]:
    """What torch says where shapes are not the policy's, as one line; that the files are whole is known."""
    try:
        yield
    except CheckpointException as error:  # holds what each rank raised
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path} does not fit the model at model.path ({first_line(cause):.200})") from error


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` holds; one process may call this.

    Raises:
        ValueError: one line; it is not what this program writes.
    """
    try:
        record = json.loads((path / STATE).read_text())
        is_sound = (
            type(record["schedule"]["steps_done"]) is int
            and isinstance(record["layout"], dict)
            and isinstance(record.get("model", {}), dict)
            and type(record["state"]["step"]) is int
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path / STATE} is not what this program writes")
    return record


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint under `root`, None where there is none.

    Incomplete and damaged ones are passed over, each with a one-line warning from rank 0. All files are read,
    shared out over the ranks.
    """
    for step in steps_in(Path(root)):
        path = Path(root) / f"step_{step}"
        fault = _fault_of(path)
        if not fault:
            return path
        if dist.get_rank() == 0:
            logger.warning("checkpoint %s is passed over: %s", path, fault)
    return None


def _require_complete(path: Path) -> None:
    fault = _fault_of(path)
    if fault:
        raise ValueError(f"{path} cannot be loaded: {fault}")


def _fault_of(path: Path) -> str:
    """What is wrong with the checkpoint at `path`, in a few words; empty: nothing. Equal on all ranks."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        expected = {name: (int(size), int(checksum)) for name, (size, checksum) in files.items()}
    except FileNotFoundError:
        return f"it has no {MARKER}: it was not written to the end"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError):
        return f"its {MARKER} is damaged"
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
        return f"its {MARKER} names files elsewhere"
    # os.path's says False for a name that no file can have, where `Path.is_file` raises.
    missing = [name for name in expected if not os.path.isfile(path / name)]
    if missing:
        return f"{missing[0]} is missing"
    assert dist.group.WORLD is not None, "checkpoints are read by joined processes"
    found = describe(path, list(expected), dist.group.WORLD)
    damaged = [name for name in expected if tuple(found[name]) != expected[name]]
    return f"{damaged[0]} is damaged" if damaged else ""


def describe(folder: Path, names: list[str], group: dist.ProcessGroup) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file; the ranks of `group` share the reading, and all must call this.

    Raises:
        OSError: on every rank, if any could not read its share.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine: dict[str, tuple[int, int]] | str
    try:
        mine = {name: _size_and_crc(folder / name) for name in names[rank::world_size]}
    except OSError as error:
        mine = f"{error.filename} cannot be read: {error.strerror}"
    merged: dict[str, tuple[int, int]] = {}
    for part in all_gather_object(mine, group):
        if isinstance(part, str):
            raise OSError(part)
        merged.update(part)
    return {name: merged[name] for name in names}


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    # Every save has a thread of its own, and glibc keeps what a thread has used for the next one that it gives the
    # same arena: a buffer of megabytes would stay in all of a process's arenas.
    block = memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            size += count
            crc = zlib.crc32(block[:count], crc)
    return size, crc


def files_of(folder: Path) -> list[str]:
    """Names of all files under `folder`, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps_in(root: Path) -> list[int]:
    """Steps with a folder under `root`, newest first."""
    if not root.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def remove_leftovers(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    root.mkdir(parents=True, exist_ok=True)
    for entry in root.iterdir():
        if entry.suffix in (".tmp", ".old") and _STEP_FOLDER.fullmatch(entry.stem):
            shutil.rmtree(entry)


def put_in_place(partial: Path, final: Path, files: dict[str, tuple[int, int]]) -> None:
    """Mark `partial` as complete with the list of its `files`, and rename it; one rank calls this."""
    write_text(partial / MARKER, json.dumps({"files": files}, indent=0))
    old = final.with_suffix(".old")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def record_of(policy: Policy) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of the model and of the ranks it was saved from."""
    groups = policy.groups
    sizes = {"tp": groups.tp_size, "cp": groups.cp_size, "pp": groups.pp_size}
    sizes |= {"dp": groups.dp_size, "ep": groups.ep_size}
    return {"layout": sizes, "model": architecture_of(policy.hf_config)}


def rng_file(rank: int) -> str:
    return f"rng/rank_{rank}.pt"


def to_plain(value: Any) -> Any:
    """NumPy arrays as marked tensors, so that the file loads without unpickling arbitrary classes."""
    if isinstance(value, np.ndarray):
        return {"numpy": torch.from_numpy(value.astype(np.int64)), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"numpy", "dtype"}:
        return value["numpy"].numpy().astype(value["dtype"])
    if isinstance(value, dict):
        return {key: _from_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_from_plain(item) for item in value)
    return value
