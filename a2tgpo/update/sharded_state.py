"""Model and optimizer on disk, in Megatron's sharded torch_dist format."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from a2tgpo.model.policy import Policy, gather_weights
from a2tgpo.update.optimizer_shards import PIECE_BYTES, UNCUT, is_distributed, owned_shards
from a2tgpo.update.shared_read import send_shared, share_reads

_WRAPPED = "module."
"""Before every parameter's name on disk: what is saved is the model in its data-parallel wrapper."""
_SLICES = "optimizer_slices"
"""What a distributed optimizer's slices are called in a state dict; not on disk."""
_INDEX_MODULES = {f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")}
"""Whose classes a checkpoint's index, a pickle, is made of."""
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


@dataclass(frozen=True, kw_only=True)
class ShardedCopy:
    """This rank's part of model and optimizer in host memory, which training no longer changes."""

    tensors: dict[str, Any]
    """What the rank writes, in the form of torch's distributed checkpoints."""
    common: dict[str, Any]
    """What is not sharded, equal on all ranks."""


def copy_sharded(policy: Policy, optimizer: Any) -> ShardedCopy:
    """Copy model and optimizer as they are now; every rank must call this, and gets its part.

    A rank takes the host memory of what it writes, and no more: its own slice of the optimizer's state, and the
    weights that fall to it where all data-parallel ranks have the same ones.
    """
    gather_weights(policy)
    # Adam makes its moments in the first update, which a run that has skipped all of them has not seen.
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)
    return copy_state(_saved_state(policy, optimizer), policy)


def copy_state(state: dict[str, Any], policy: Policy) -> ShardedCopy:
    """Copy what this rank writes of a sharded state dict, which is used up; every rank must call this.

    The work of `dist_checkpointing.save` up to the writing, in its order.
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


def write_sharded(folder: Path, copy: ShardedCopy, group: ProcessGroup) -> None:
    """Write the copies of all ranks into the empty `folder`; every rank of `group`, which is all, must call this.

    Raises:
        CheckpointException: on all ranks, if one could not write.
        OSError: on the first rank, before the others write, which they then do in vain.
    """
    fault = None
    try:
        if dist.get_rank(group) == 0:
            torch.save(copy.common, folder / COMMON_STATE_FNAME)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    except OSError as error:
        fault = error
    # By threads of this process: Megatron's own writer leaves a manager process behind on every rank, spawned anew
    # from the main script, and forks a process per file (filesystem_async.py), which a process with an engine's
    # threads in it should not do.
    torch_checkpoint.save(
        copy.tensors,
        storage_writer=_Writer(folder),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    if fault is not None:
        raise fault


class _Writer(torch_checkpoint.FileSystemWriter):
    """Torch's, which tells a full disk from other troubles."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # Closing the file after an error complains of its position, in place of the error.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def load_sharded(folder: Path, policy: Policy, optimizer: Any) -> None:
    """Read into model and optimizer what `write_sharded` wrote, on any layout; every rank calls this.

    Each rank reads its own slice of the optimizer's state and a share of the weights that data-parallel ranks hold
    alike (`shared_read`), into place, one saved piece at a time: `optimizer_shards.PIECE_BYTES` of host memory, or in
    a checkpoint from before the optimizer was saved in pieces a tensor-parallel rank's part of a parameter.

    Raises:
        ValueError: if the checkpoint's index is not what it should be.
    """
    _check_index(folder / ".metadata")
    models, shared = model_shards(policy), []
    if is_distributed(optimizer):
        common = dist_checkpointing.load_common_state_dict(str(folder))
        optimizer.load_state_dict(_settings(common["optimizer"]))  # makes the moments where there are none
        slices = owned_shards(optimizer, models, piece_bytes=UNCUT)
        shared = share_reads(models, policy.groups)
        loaded = _read(folder, {**models, _SLICES: slices})
    else:
        state = optimizer.sharded_state_dict(
            dict(models), is_loading=True, metadata=sharding_metadata(policy)
        )
        loaded = _read(folder, {**models, "optimizer": state})
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    for number, chunk in enumerate(policy.chunks):
        # Not strict: the `_extra_state` of modules is not saved, see `_tensors_of`, and other ranks read the rest.
        chunk.load_state_dict(loaded.get(_model_key(policy, number), {}), strict=False)
    send_shared(shared)


def load_sharded_weights(folder: Path, policy: Policy) -> None:
    """Read only the model of what `write_sharded` wrote, on any layout; every rank calls this.

    Raises:
        ValueError: if the checkpoint's index is not what it should be.
    """
    _check_index(folder / ".metadata")
    metadata = sharding_metadata(policy)
    state = {
        _model_key(policy, number): _tensors_of(model.sharded_state_dict(_WRAPPED, metadata=metadata))
        for number, model in enumerate(policy.gpt_models)
    }
    shared = share_reads(state, policy.groups)
    loaded = _read(folder, state)
    for number, model in enumerate(policy.gpt_models):
        tensors = loaded.get(_model_key(policy, number), {})
        model.load_state_dict(
            {name.removeprefix(_WRAPPED): value for name, value in tensors.items()}, strict=False
        )
    send_shared(shared)


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        # Megatron reads through functions and attributes that torch has marked for removal.
        warnings.simplefilter("ignore", FutureWarning)
        return dist_checkpointing.load(state, str(folder))


def _saved_state(policy: Policy, optimizer: Any) -> dict[str, Any]:
    """What is saved; every rank calls this."""
    models = model_shards(policy)
    if not is_distributed(optimizer):
        metadata = sharding_metadata(policy)
        return {**models, "optimizer": optimizer.sharded_state_dict(dict(models), metadata=metadata)}
    parts = optimizer.chained_optimizers
    if len(parts) > 1:
        optimizer._synchronize_steps()  # of parameter groups that are empty on some ranks
    settings = [part.state_dict() for part in parts]
    return {
        **models,
        "optimizer": settings[0] if len(parts) == 1 else dict(enumerate(settings)),
        _SLICES: owned_shards(optimizer, models, piece_bytes=PIECE_BYTES),
    }


def _settings(saved: dict[Any, Any]) -> dict[Any, Any]:
    """Parameter groups and steps of one or several chained optimizers, as `load_state_dict` takes them.

    Checkpoints from before the optimizer was saved in slices say besides how its tensors were laid out.
    """
    if "optimizer" not in saved:
        return {number: _settings(part) for number, part in saved.items()}
    return {name: value for name, value in saved.items() if not name.startswith("param_state")}


def model_shards(policy: Policy) -> dict[str, Any]:
    """The sharded state dict of each chunk, under its name in a checkpoint."""
    metadata = sharding_metadata(policy)
    return {
        _model_key(policy, number): _tensors_of(chunk.sharded_state_dict(metadata=metadata))  # type: ignore[operator]
        for number, chunk in enumerate(policy.chunks)
    }


def sharding_metadata(policy: Policy) -> dict[str, Any]:
    """Megatron's settings of how a state dict is divided."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": policy.groups.dp_cp_group,
    }


def _check_index(path: Path) -> None:
    """Refuse a checkpoint index that names anything but the records it is made of, or anything but tensors.

    It is a pickle which torch reads without restriction, so this must come first; and what it calls bytes instead of
    tensors torch would unpickle as freely.

    Raises:
        ValueError: naming what it holds.
    """
    try:
        content = path.read_bytes()
        _check_memo(content)
        index = _IndexUnpickler(io.BytesIO(content)).load()
        entries = dict(index.state_dict_metadata)
    except ValueError:
        raise
    except Exception as error:  # bytes that are no pickle fail in any way
        raise ValueError(f"the checkpoint's index is damaged ({type(error).__name__})") from None
    for name, entry in entries.items():
        if type(entry) is not TensorStorageMetadata:
            raise ValueError(f"the checkpoint's index has no tensor for {name!r:.80}")


def _check_memo(content: bytes) -> None:
    """Refuse a pickle that numbers a memo entry past its own length, which no pickler does.

    The unpickler makes its memo twice as long as the number, 64 GiB for one flipped bit, before it reads any more.
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
                f"the checkpoint's index names {module}.{name}, which is no part of a checkpoint"
            )
        return super().find_class(module, name)


def _to_host(value: Any) -> Any:
    """A copy of `value` that shares no memory with it, tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return deepcopy(value)


def _tensors_of(state: dict[str, Any]) -> dict[str, Any]:
    """Without the modules' `_extra_state`: empty outside FP8 delayed scaling, and a pickle when read back."""
    return {name: value for name, value in state.items() if "_extra_state" not in name}


def _model_key(policy: Policy, number: int) -> str:
    return "model" if len(policy.chunks) == 1 else f"model{number}"
