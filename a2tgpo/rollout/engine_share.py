"""Choose the engine's share of GPU memory if the configuration does not set it."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from a2tgpo.config.run import RunConfig
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.plan.dimensions import model_dimensions
from a2tgpo.plan.engine_share import with_engine_share
from a2tgpo.plan.hardware import GIB, GPUS


def settle_engine_share(config: RunConfig) -> RunConfig:
    """Return `config` with the engine's memory share and KV cache size from a memory plan. Every rank must call this.

    The plan is made for the GPU with the least memory, so all ranks get the same share. If there is no GPU, or if
    `rollout.gpu_memory_fraction` is set, `config` is returned unchanged.

    Raises:
        ConfigError: with a one-line message, if the plan does not support the model.
    """
    if config.rollout.gpu_memory_fraction or not torch.cuda.is_available():
        return config
    sizes, world = [torch.cuda.get_device_properties(0).total_memory], dist.group.WORLD
    if dist.is_initialized() and world is not None:
        sizes = all_gather_object(sizes[0], world)
    gpu = dataclasses.replace(GPUS[config.cluster.gpu], memory_gib=min(sizes) / GIB)
    dimensions, _ = model_dimensions(config.model.path)
    return with_engine_share(config, dimensions, gpu, gpus=len(sizes))
