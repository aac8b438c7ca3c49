"""Create and destroy the process group and Megatron's parallel state."""

from __future__ import annotations

import math
import os
import random
import socket
import warnings
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import Store

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.parallel.groups import ParallelGroups

_set_here: list[str] = []
"""Environment variables that `_be_alone` has set, and that `shutdown` removes."""


def initialize(config: ParallelConfig, *, seed: int, store: Store | None = None) -> ParallelGroups:
    """Join the other processes and return this process's groups. Every process must call this first, and only once.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read from the environment. If RANK is not set, this
    process is the only one. The backend is NCCL on a machine with a GPU, and otherwise gloo.

    Args:
        seed: seed of the generators of Python, NumPy and torch, the same on all ranks.
        store: rendezvous store that the processes already share. None: create one at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: if the number of processes cannot be divided according to `config`.
    """
    if "RANK" not in os.environ:
        _be_alone()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_layout(config, world_size)
    # Megatron requires this variable if parallel.tensor > 1. The GPU then runs a layer's communication and
    # computation in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron calls some collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", _local_rank())
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    if store is not None:
        store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if device else "gloo",
        timeout=timeout,
        # Without device_id, a group's communicator is created at the group's first collective. With device_id,
        # creating any group would split the communicator of all ranks.
        store=store,
        rank=rank,
        world_size=world_size,
    )
    return lay_out(config, seed=seed)


def lay_out(config: ParallelConfig, *, seed: int) -> ParallelGroups:
    """Divide the processes according to `config`, and replace any earlier layout. Every process must call this."""
    check_layout(config, dist.get_world_size())
    if parallel_state.is_initialized():
        _leave_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,  # experts are narrow, so no expert is divided over ranks
        virtual_pipeline_model_parallel_size=config.virtual if config.virtual > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=math.ceil(config.timeout_s / 60),
        create_gloo_process_groups=False,  # Megatron would create gloo groups that nothing uses
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _groups()


def check_layout(config: ParallelConfig, world_size: int) -> None:
    """Raise `ConfigError` if `world_size` processes cannot be divided according to `config`."""
    if world_size % config.model_ranks:
        raise ConfigError(
            f"parallel.tensor ({config.tensor}) x parallel.context ({config.context}) x parallel.pipeline "
            f"({config.pipeline}) = {config.model_ranks} does not divide the {world_size} processes started; start a "
            f"multiple of {config.model_ranks}"
        )
    stage_ranks = world_size // config.pipeline
    if stage_ranks % config.expert:
        raise ConfigError(
            f"parallel.expert is {config.expert}; allowed: a divisor of the {stage_ranks} ranks of a pipeline stage "
            f"(parallel.tensor {config.tensor} x parallel.context {config.context} x "
            f"{stage_ranks // config.tensor // config.context} data-parallel)"
        )


def shutdown() -> None:
    """Destroy the process group and Megatron's parallel state. Every process must call this last."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in _set_here:
        os.environ.pop(name, None)
    _set_here.clear()


def _leave_layout() -> None:
    """Destroy the groups of a layout, because each gloo group has a thread that wakes a hundred times a second."""
    dist.barrier()  # after the barrier, no rank is still sending in one of the groups
    for group in parallel_state._global_process_group_list:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _be_alone() -> None:
    """Set the environment variables that a launcher would set for a single process, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)
    _set_here.extend(alone)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _groups() -> ParallelGroups:
    groups = ParallelGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=_local_rank(),
        device=torch.device("cuda", _local_rank()) if torch.cuda.is_available() else torch.device("cpu"),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_group=parallel_state.get_context_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        edp_group=parallel_state.get_expert_data_parallel_group(),
    )
    # Megatron's model-parallel group contains only the replica's ranks that have this rank's cp_rank.
    model_ranks = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    assert model_ranks == [
        rank for rank in groups.dp_ranks_of(groups.dp_rank) if groups.cp_rank_of(rank) == groups.cp_rank
    ], "Megatron laid the ranks out in another order than ParallelGroups states"
    assert groups.ep_rank == groups.rank % (groups.world_size // groups.pp_size) % groups.ep_size, (
        "Megatron laid the expert-parallel ranks out in another order than ParallelGroups states"
    )
    return groups
