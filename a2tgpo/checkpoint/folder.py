"""Find, check and load checkpoints. A checkpoint has all state that a run needs to continue as if it had not stopped.

The folder `ROOT/step_N/` of a checkpoint contains
- `sharded/` and `optimizer/`, which are Megatron's torch_dist checkpoints of model and optimizer;
- `rng/rank_R.pt`, the random state of rank R;
- `state.json`, with the learning rate schedule, the layout, the model's architecture and the caller's own values;
- `adapter/`, if the policy has adapters: the adapters in PEFT's format. `sharded/` and `optimizer/` then contain only
  adapters and their state;
- files of the caller.

The writer (`writer.py`) writes the files to `.step_N.unfinished`, adds `complete.json` with the sizes and checksums
of all files, and renames the folder. If `complete.json` is missing or does not match the files, the folder is not a
checkpoint. No code in a checkpoint is ever executed.

All ranks must see the same file system. Every rank must call each public function, unless the function's docstring
says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from a2tgpo.checkpoint.checked_files import DamagedFileError, Piece, size_and_checksum, size_and_crc
from a2tgpo.checkpoint.origin import (
    origin_of,
    require_same_adapters,
    require_same_base,
    require_same_model,
    require_same_optimizer,
)
from a2tgpo.checkpoint.sharded_state import WEIGHTS, load_sharded, load_sharded_weights
from a2tgpo.io.atomic_file import folders_beside, put_folder_in_place, write_text
from a2tgpo.io.errors import first_line
from a2tgpo.model.adapter_files import ADAPTER_FOLDER
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.rng import set_rng_state
from a2tgpo.update.optimizer import LearningRateSchedule

logger = logging.getLogger(__name__)

MARKER = "complete.json"
STATE = "state.json"
WEIGHTS_ONLY = "weights_only"
"""Key of `complete.json`: True if `retention.py` has removed all but the weights of the checkpoint."""
_STEP_FOLDER = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.step_\d+\.(unfinished|replaced)|step_\d+\.(tmp|old)")
"""Names of the folders that an interrupted save leaves behind. Earlier versions left `step_N.tmp` or `step_N.old`."""


class DamagedCheckpointError(ValueError):
    """A tensor of a checkpoint is not the tensor that was written. The message is one line."""


def load_newest(
    path: Path, *, policy: Policy, optimizer: Any, schedule: LearningRateSchedule
) -> tuple[Path, dict[str, Any]]:
    """Load `path`, a result of `latest`. If this checkpoint is damaged, load the newest undamaged checkpoint before
    it.

    Returns:
        The path of the checkpoint that was loaded, and the `state` in it.

    Raises:
        ValueError: with a one-line message, if every checkpoint is damaged, or if `load` refused an undamaged
            checkpoint.
    """
    newest: Path | None = path
    while newest is not None:
        try:
            state = load(newest, policy=policy, optimizer=optimizer, schedule=schedule, is_checked=True)
        except DamagedCheckpointError as error:
            if dist.get_rank() == 0:
                logger.warning("skipping checkpoint %s: %s", newest, error)
            newest = latest(path.parent, before=step_of(newest))
        else:
            return newest, state
    raise ValueError(f"every checkpoint in {path.parent} is damaged; --resume none starts the run over")


def load(
    path: str | Path,
    *,
    policy: Policy,
    optimizer: Any,
    schedule: LearningRateSchedule,
    is_checked: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint's weights, optimizer state, schedule and random states.

    If the saving run had a different layout, the random states are not restored, because a random state belongs to
    one rank.

    Args:
        is_checked: True if `latest` has already checked the files. This function then checks only the tensors.

    Returns:
        The `state` that the saving run passed to `CheckpointWriter.start`.

    Raises:
        DamagedCheckpointError: on all ranks, if a tensor is damaged. Other tensors may already have been loaded.
        ValueError: with a one-line message, if `path` is not a complete checkpoint of this program or belongs to
            another model.
    """
    path = Path(path)
    if has_weights_only(path):
        raise ValueError(
            f"{path} has only weights, and a run cannot continue from them; give one of the newest checkpoints"
        )
    if not is_checked:
        _require_complete(path)
    record = read_record(path)
    rng = None
    require_same_model(path, record, policy.hf_config)
    require_same_adapters(path, record, policy)
    require_same_base(path, record, policy)
    require_same_optimizer(path, record, optimizer)
    if record["layout"] == origin_of(policy)["layout"]:
        try:
            rng = torch.load(path / rng_file(policy.groups.rank), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"{path / rng_file(policy.groups.rank)} is damaged") from error
    elif policy.groups.rank == 0:
        logger.warning("%s was saved with another layout; random states are not restored", path)
    with _in_one_line(path):
        load_sharded(path, policy, optimizer, pieces=_pieces_of(path))
    schedule.load_state_dict(record["schedule"])
    if rng is not None:
        set_rng_state(_from_plain(rng))
    return record["state"]


def load_weights(path: str | Path, policy: Policy) -> None:
    """Load and check only the weights of a checkpoint of any layout.

    Raises:
        ValueError: with a one-line message, if `path` is not a complete checkpoint or belongs to another model.
    """
    path = Path(path)
    _require_complete(path, weights_only=True)
    record = read_record(path)
    require_same_model(path, record, policy.hf_config)
    require_same_adapters(path, record, policy)
    require_same_base(path, record, policy)
    with _in_one_line(path):
        load_sharded_weights(path, policy, pieces=_pieces_of(path))


@contextlib.contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Convert torch's error for damaged tensors or unexpected shapes to an error with a one-line message."""
    try:
        yield
    except CheckpointException as error:  # `error.failures` maps each failed rank to its exception
        for cause, _ in error.failures.values():
            if isinstance(cause, DamagedFileError):
                raise DamagedCheckpointError(f"{path} cannot be loaded: {cause} is damaged") from error
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path} does not fit the model at model.path ({first_line(cause):.200})") from error


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json`; one process may call this.

    Raises:
        ValueError: with a one-line message, if the file cannot be read or this program did not write it.
    """
    try:
        record = json.loads((path / STATE).read_text())
        is_sound = (
            type(record["schedule"]["steps_done"]) is int
            and isinstance(record["layout"], dict)
            and isinstance(record.get("model", {}), dict)
            and isinstance(record.get("lora", {}), dict)
            and type(record["state"]["step"]) is int
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path / STATE} was not written by this program")
    return record


def latest(root: str | Path, *, before: int | None = None) -> Path | None:
    """Return the newest complete checkpoint under `root`, or None if there is none.

    Rank 0 logs one line for each checkpoint that is skipped because it is incomplete or damaged. Tensors with
    checksums are not read, because `load` checks them.

    Args:
        before: return only a checkpoint of a step before this one. None allows any step.
    """
    for step in steps_in(Path(root)):
        if before is not None and step >= before:
            continue
        path = Path(root) / f"step_{step}"
        fault = "it has only weights" if has_weights_only(path) else _fault_of(path)
        if not fault:
            return path
        if dist.get_rank() == 0:
            logger.warning("skipping checkpoint %s: %s", path, fault)
    return None


def has_weights_only(path: Path) -> bool:
    """Return whether retention has removed all but the weights of a checkpoint; one process may call this."""
    try:
        return bool(json.loads((path / MARKER).read_text()).get(WEIGHTS_ONLY))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def step_of(path: Path) -> int:
    """Return the step number N of a checkpoint's folder `step_N`."""
    return int(path.name.removeprefix("step_"))


def is_of_weights(name: str) -> bool:
    """Return whether retention keeps the file `name` when it reduces a checkpoint to its weights."""
    return name == STATE or name.startswith((f"{WEIGHTS}/", f"{ADAPTER_FOLDER}/"))


def _require_complete(path: Path, *, weights_only: bool = False) -> None:
    fault = _fault_of(path, weights_only=weights_only)
    if fault:
        raise ValueError(f"{path} cannot be loaded: {fault}")


def _fault_of(path: Path, *, weights_only: bool = False) -> str:
    """Return the first fault of the checkpoint at `path`, or an empty string. The result is equal on all ranks.

    Tensors with checksums are not read. With `weights_only`, only the files that `load_weights` reads are checked.
    """
    try:
        expected, pieces = _read_marker(path)
    except ValueError as error:
        return str(error)
    world = world_group()
    names = [name for name in expected if is_of_weights(name) or not weights_only]
    share = names[world.rank() :: world.size()]
    faults = all_gather_object(_first_fault(path, {name: expected[name] for name in share}, pieces), world)
    return next((fault for fault in faults if fault), "")


def _read_marker(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, list[Piece]]]:
    """Return a map from each file to its size and checksum, and a map from each tensor file to its pieces.

    Raises:
        ValueError: with a short message, if the checkpoint is incomplete or its list of files is damaged.
    """
    try:
        marker = json.loads((path / MARKER).read_text())
        expected = {name: (int(size), int(checksum)) for name, (size, checksum) in marker["files"].items()}
        pieces = _parse_pieces(marker)
        is_sound = all(expected[name] == size_and_checksum(of_file) for name, of_file in pieces.items())
    except FileNotFoundError:
        raise ValueError(f"it has no {MARKER}: writing it was interrupted") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"its {MARKER} is damaged")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
        raise ValueError(f"its {MARKER} lists files outside the folder")
    return expected, pieces


def _first_fault(path: Path, expected: dict[str, tuple[int, int]], pieces: Collection[str]) -> str:
    """Return the first fault of the files in `expected`, or "". For a file in `pieces`, only check the size."""
    # For an invalid file name, os.path.isfile returns False, but `Path.is_file` raises an error.
    for name in expected:
        if not os.path.isfile(path / name):
            return f"{name} is missing"
    for name, (size, checksum) in expected.items():
        try:
            is_whole = (
                (path / name).stat().st_size == size
                if name in pieces
                else size_and_crc(path / name) == (size, checksum)
            )
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not is_whole:
            return f"{name} is damaged"
    return ""


def _pieces_of(path: Path) -> dict[str, list[Piece]]:
    """Return a map from each tensor file to its pieces. The map of a checkpoint of an earlier version is empty."""
    return _parse_pieces(json.loads((path / MARKER).read_text()))


def _parse_pieces(marker: dict[str, Any]) -> dict[str, list[Piece]]:
    return {
        name: [(int(start), int(size), int(checksum)) for start, size, checksum in of_file]
        for name, of_file in marker.get("pieces", {}).items()
    }


def files_of(folder: Path) -> list[str]:
    """Return the names of all files under `folder`, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps_in(root: Path) -> list[int]:
    """Return all steps N for which `root` has a folder `step_N`, the newest step first."""
    if not root.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def remove_leftovers(root: Path) -> None:
    """Remove the folders that interrupted saves have left in `root`, which is created if it is missing."""
    root.mkdir(parents=True, exist_ok=True)
    for entry in root.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry)


def put_in_place(final: Path, files: dict[str, tuple[int, int]], pieces: dict[str, list[Piece]]) -> None:
    """Write `complete.json` to the unfinished folder, and rename the folder to `final`; one rank calls this.

    Args:
        files: maps each file outside `pieces` to the file's size and checksum.
        pieces: maps each tensor file to its pieces.
    """
    sums = {name: size_and_checksum(of_file) for name, of_file in pieces.items()}
    written, _ = folders_beside(final)
    write_text(written / MARKER, json.dumps({"files": files | sums, "pieces": pieces}))
    put_folder_in_place(final)


def rng_file(rank: int) -> str:
    return f"rng/rank_{rank}.pt"


def to_plain(value: Any) -> Any:
    """Replace each NumPy array in `value` with a marked tensor, so that `torch.load` unpickles no NumPy class."""
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
