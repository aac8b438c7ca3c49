"""Write and read model and optimizer in Megatron's sharded torch_dist format.

The folder `WEIGHTS` contains the model, and the folder `OPTIMIZER` contains the optimizer. In a checkpoint of an
earlier version, `WEIGHTS` contains both.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from a2tgpo.checkpoint.checked_files import CheckedWriter, Piece, checked_reading
from a2tgpo.checkpoint.optimizer_shards import PIECE_BYTES, UNCUT, is_distributed, owned_shards
from a2tgpo.checkpoint.shared_read import send_shared, share_reads
from a2tgpo.model.lora import is_adapter
from a2tgpo.model.policy import Policy, gather_weights
from a2tgpo.parallel.collectives import all_gather_object, world_group

WEIGHTS, OPTIMIZER = "sharded", "optimizer"
_WRAPPED = "module."
"""Prefix of every parameter's name on disk, because a save writes the model inside its data-parallel wrapper."""
_SLICES = "optimizer_slices"
"""Key of a distributed optimizer's slices in a state dict in memory. The key does not appear on disk."""
_INDEX_MODULES = {f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")}
"""Modules whose classes may occur in a checkpoint's index. The index is a pickle."""
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


@dataclass(frozen=True, kw_only=True)
class ShardedCopy:
    """A copy of this rank's part of model and optimizer in host memory, where training cannot change it."""

    tensors: dict[str, Any]
    """The tensors that this rank writes, in the form that torch's distributed checkpoints take."""
    common: dict[str, Any]
    """The state that is not sharded and is equal on all ranks."""


def copy_sharded(policy: Policy, optimizer: Any) -> ShardedCopy:
    """Return a copy of this rank's part of model and optimizer; every rank must call this.

    The copy contains the rank's own slice of the optimizer's state, and its share of the weights that all
    data-parallel ranks have.
    """
    gather_weights(policy)
    # Adam creates its moments in the first update. If all updates so far were skipped, create the moments here.
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)
    return copy_state(_saved_state(policy, optimizer), policy)


def copy_state(state: dict[str, Any], policy: Policy) -> ShardedCopy:
    """Return a copy of the part of the sharded state dict `state` that this rank writes; every rank must call this.

    Like `dist_checkpointing.save`, this function takes `state` apart, so do not use `state` again.
    """
    sharded, common = save_preprocess(state)
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1), policy.groups.dp_cp_group
    )
    strategy.apply_saving_parallelization(sharded)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    for shard in (shard for shards in by_key.values() for shard in shards):
        shard.data = _to_host(shard.data)
    return ShardedCopy(tensors=mcore_to_pyt_state_dict(by_key, False), common=_to_host(common))


def write_sharded(path: Path, copy: ShardedCopy, group: ProcessGroup) -> dict[str, list[Piece]]:
    """Write the copies of all ranks into empty folders of the checkpoint `path`; every rank must call this.

    Args:
        group: a group of all ranks.

    Returns:
        The pieces of each file that this rank has written, by the file's path within `path`.

    Raises:
        CheckpointException: on all ranks, if a rank could not write its tensors.
        OSError: only on the first rank, if it could not write the common state. Even then, all ranks have written
            their tensors.
    """
    weights = {key: value for key, value in copy.tensors.items() if key.startswith(_WRAPPED)}
    others = {key: value for key, value in copy.tensors.items() if key not in weights}
    parts = {WEIGHTS: ShardedCopy(tensors=weights, common={})}
    parts[OPTIMIZER] = ShardedCopy(tensors=others, common=copy.common)
    written: dict[str, list[Piece]] = {}
    for name, part in parts.items():
        pieces = write_part(path / name, part, group)
        written |= {f"{name}/{file}": of_file for file, of_file in pieces.items()}
    return written


def write_part(folder: Path, copy: ShardedCopy, group: ProcessGroup) -> dict[str, list[Piece]]:
    """Write the copies of all ranks into the empty folder `folder`; every rank must call this.

    Returns and raises the same as `write_sharded`, except that file names are relative to `folder`.
    """
    fault = None
    try:
        if dist.get_rank(group) == 0:
            torch.save(copy.common, folder / COMMON_STATE_FNAME)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    except OSError as error:
        fault = error
    # Write with threads of this process. Megatron's own writer (filesystem_async.py) leaves a manager process on
    # every rank and forks one process per file, which is unsafe while an engine's threads run.
    writer = CheckedWriter(folder)
    torch_checkpoint.save(
        copy.tensors,
        storage_writer=writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    if fault is not None:
        raise fault
    return writer.pieces


def load_sharded(
    path: Path, policy: Policy, optimizer: Any, *, pieces: Mapping[str, list[Piece]] = MappingProxyType({})
) -> None:
    """Load the model and optimizer that `write_sharded` wrote, in any layout; every rank must call this.

    Each rank reads its own slice of the optimizer's state, and a share of the weights that all data-parallel ranks
    have (`shared_read`). A load takes `optimizer_shards.PIECE_BYTES` of host memory, because a rank reads one piece
    at a time. A checkpoint of an earlier version has no pieces. Loading it takes as much host memory as one rank's
    part of a parameter.

    Args:
        pieces: the results of `write_sharded` on all ranks. If there are none, no checksum is compared.

    Raises:
        ValueError: if the checkpoint's index is damaged, or if an entry of the index is not a tensor.
        CheckpointException: on all ranks, if a shape differs from the policy's or a piece does not match its checksum
            (`DamagedFileError`).
    """
    with_optimizer = path / OPTIMIZER
    folder = with_optimizer if with_optimizer.is_dir() else path / WEIGHTS
    for part in {path / WEIGHTS, folder}:
        _check_index(part / ".metadata")
    models, shared = model_shards(policy), []
    if is_distributed(optimizer):
        common = dist_checkpointing.load_common_state_dict(str(folder))
        optimizer.load_state_dict(_settings(common["optimizer"]))  # also creates missing moments
        slices = owned_shards(optimizer, models, piece_bytes=UNCUT)
        _read(folder, {_SLICES: slices}, pieces)
        shared = share_reads(models, policy.groups)
    else:
        state = optimizer.sharded_state_dict(
            dict(models), is_loading=True, metadata=sharding_metadata(policy)
        )
        loaded = _read(folder, {"optimizer": state}, pieces)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    loaded = _read(path / WEIGHTS, models, pieces)
    for number, chunk in enumerate(policy.chunks):
        # Not strict, because `loaded` lacks the state that is not saved, and the weights that other ranks read.
        chunk.load_state_dict(loaded.get(_model_key(policy, number), {}), strict=False)
    send_shared(shared)


def load_sharded_weights(
    path: Path, policy: Policy, *, pieces: Mapping[str, list[Piece]] = MappingProxyType({})
) -> None:
    """Load only the model that `write_sharded` wrote. `pieces` and the errors are those of `load_sharded`.

    Every rank must call this.
    """
    folder = path / WEIGHTS
    _check_index(folder / ".metadata")
    metadata = sharding_metadata(policy)
    state = {
        _model_key(policy, number): _saved_tensors(
            policy, model.sharded_state_dict(_WRAPPED, metadata=metadata)
        )
        for number, model in enumerate(policy.gpt_models)
    }
    shared = share_reads(state, policy.groups)
    loaded = _read(folder, state, pieces)
    for number, model in enumerate(policy.gpt_models):
        tensors = loaded.get(_model_key(policy, number), {})
        model.load_state_dict(
            {name.removeprefix(_WRAPPED): value for name, value in tensors.items()}, strict=False
        )
    send_shared(shared)


def _read(folder: Path, state: dict[str, Any], pieces: Mapping[str, list[Piece]]) -> dict[str, Any]:
    """Call `dist_checkpointing.load`, and if it fails on any rank, raise the error on all ranks.

    Every rank must call this. Megatron-Core 0.19 does not share errors: no rank waits for the others during a load.
    """
    inside = {
        name.split("/")[1]: of_file for name, of_file in pieces.items() if name.startswith(f"{folder.name}/")
    }
    with warnings.catch_warnings(), checked_reading(folder, inside):
        # Megatron uses functions and attributes that torch has deprecated, and each use causes a warning.
        warnings.simplefilter("ignore", FutureWarning)
        loaded: dict[str, Any] = {}
        failures: dict[int, Any] = {}
        try:
            loaded = dist_checkpointing.load(state, str(folder))
        except CheckpointException as error:
            failures = error.failures
    of_ranks = all_gather_object(failures, world_group())
    if any(of_ranks):
        first = {rank: next(iter(found.values())) for rank, found in enumerate(of_ranks) if found}
        raise CheckpointException("load", first)
    return loaded


def _saved_state(policy: Policy, optimizer: Any) -> dict[str, Any]:
    """Return the sharded state dict of model and optimizer that a save writes; every rank must call this."""
    models = model_shards(policy)
    if not is_distributed(optimizer):
        metadata = sharding_metadata(policy)
        return {**models, "optimizer": optimizer.sharded_state_dict(dict(models), metadata=metadata)}
    parts = optimizer.chained_optimizers
    if len(parts) > 1:
        optimizer._synchronize_steps()  # a rank has not counted the steps of a group in which it has no parameters
    settings = [part.state_dict() for part in parts]
    return {
        **models,
        "optimizer": settings[0] if len(parts) == 1 else dict(enumerate(settings)),
        _SLICES: owned_shards(optimizer, models, piece_bytes=PIECE_BYTES),
    }


def _settings(saved: dict[Any, Any]) -> dict[Any, Any]:
    """Return the saved parameter groups and steps of the chained optimizers as `load_state_dict` takes them.

    The function drops the layout of the optimizer's tensors, which only older checkpoints contain.
    """
    if "optimizer" not in saved:
        return {number: _settings(part) for number, part in saved.items()}
    return {name: value for name, value in saved.items() if not name.startswith("param_state")}


def model_shards(policy: Policy) -> dict[str, Any]:
    """Return a map from the name of each model chunk in a checkpoint to the chunk's saved tensors as shards."""
    metadata = sharding_metadata(policy)
    return {
        _model_key(policy, number): _saved_tensors(
            policy,
            chunk.sharded_state_dict(metadata=metadata),  # type: ignore[operator]
        )
        for number, chunk in enumerate(policy.chunks)
    }


def sharding_metadata(policy: Policy) -> dict[str, Any]:
    """Return the settings with which Megatron divides a state dict into shards."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": policy.groups.dp_cp_group,
    }


def _check_index(path: Path) -> None:
    """Refuse a checkpoint index that contains a class which no index needs, or an entry that is not a tensor.

    Torch unpickles any class in the index and each entry marked as bytes, so this check must run before torch reads
    the index.

    Raises:
        ValueError: with a one-line message that names the unexpected content.
    """
    try:
        content = path.read_bytes()
        _check_memo(content)
        index = _IndexUnpickler(io.BytesIO(content)).load()
        entries = dict(index.state_dict_metadata)
    except ValueError:
        raise
    except Exception as error:  # a malformed pickle may raise any exception
        raise ValueError(f"the checkpoint's index is damaged ({type(error).__name__})") from None
    for name, entry in entries.items():
        if type(entry) is not TensorStorageMetadata:
            raise ValueError(f"the checkpoint's index has no tensor for {name!r:.80}")


def _check_memo(content: bytes) -> None:
    """Raise ValueError if the pickle `content` has a memo index larger than its own length.

    The unpickler allocates a memo of twice the largest index, so one flipped bit could make it allocate 64 GiB.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and int(argument or 0) > len(content):
            raise ValueError(f"the checkpoint's index is damaged (memo entry {argument})")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _INDEX_NAMES
        if module == "torch":
            known |= isinstance(getattr(torch, name, None), torch.dtype)
        elif module in _INDEX_MODULES and "." not in name:
            found = super().find_class(module, name)
            known = isinstance(found, type) and found.__module__ == module
        if not known:
            raise ValueError(
                f"the checkpoint's index names {module}.{name}, which a checkpoint does not contain"
            )
        return super().find_class(module, name)


def _to_host(value: Any) -> Any:
    """Return a copy of `value` in which all tensors are on the CPU. The copy shares no memory with `value`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return deepcopy(value)


def _saved_tensors(policy: Policy, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a chunk's `state` that a checkpoint contains.

    The modules' `_extra_state` is left out, because only FP8 delayed scaling needs it. If the policy has adapters,
    the other weights are left out, because every start reads them from `model.path`.
    """
    return {
        name: value
        for name, value in state.items()
        if "_extra_state" not in name and (policy.adapters is None or is_adapter(name))
    }


def _model_key(policy: Policy, number: int) -> str:
    return "model" if len(policy.chunks) == 1 else f"model{number}"
