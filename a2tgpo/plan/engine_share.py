"""Choose the engine's share of a GPU and the size of its KV cache, if the configuration does not set them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import engine_memory, kv_bytes_per_token
from a2tgpo.plan.hardware import GIB, Gpu
from a2tgpo.plan.memory import memory_phases
from a2tgpo.plan.workload import Workload, geometry

SAFETY_MARGIN = 0.1
"""Share of the GPU that stays free in the phases `start` and `rollout`, in addition to the plan's reserve."""
STEP_GIB = 0.5
"""The size of a chosen cache is a multiple of this many GiB."""
DECIMALS = 3
LARGEST_SHARE = 0.95


def with_engine_share(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    *,
    gpus: int,
    assumed: Assumptions | None = None,
) -> RunConfig:
    """Return `config` with values for `rollout.gpu_memory_fraction` and `rollout.kv_cache_gib`.

    If `config` sets the fraction, return `config` unchanged. If `config` sets only the cache, the cache is kept. A
    chosen cache leaves `SAFETY_MARGIN` of the GPU free, but is always large enough for one sequence. It is never
    larger than the sequences in flight need. The fraction is the sum of weights, workspace, graphs and cache, divided
    by the GPU's memory.
    """
    rollout = config.rollout
    if rollout.gpu_memory_fraction:
        return config
    if not rollout.kv_cache_gib:
        cache = _chosen_cache_gib(config, dimensions, gpu, gpus, assumed or Assumptions())
        rollout = dataclasses.replace(rollout, kv_cache_gib=cache)
        config = dataclasses.replace(config, rollout=rollout)
    share = engine_memory(config, dimensions, gpu).total / (gpu.memory_gib * GIB)
    share = min(LARGEST_SHARE, math.ceil(share * 10**DECIMALS) / 10**DECIMALS)
    return _with(config, gpu_memory_fraction=share)


def _chosen_cache_gib(
    config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, gpus: int, assumed: Assumptions
) -> float:
    one = config.max_model_len * kv_bytes_per_token(config, dimensions) / GIB
    in_flight = max(config.rollout.max_concurrent, math.ceil(_trajectories_per_engine(config.rollout, gpus)))
    room = _engine_room(config, dimensions, gpu, gpus, assumed) - _beside_cache(config, dimensions, gpu)
    most = max(_down(room / GIB), _up(one))
    return min(most, _up(in_flight * one))


def _engine_room(
    config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, gpus: int, assumed: Assumptions
) -> float:
    """Return the most bytes that the engine may take if the phases `start` and `rollout` must both fit the GPU."""
    without = _with(config, kv_cache_gib=0.0, gpu_memory_fraction=0.0)  # plan an engine that takes no memory
    divided = geometry(without, dimensions, Workload().limited(config), gpus=gpus, kv_cache_bytes=0.0)
    phases = memory_phases(without, dimensions, gpu, divided, assumed)
    others = max(phase.peak for phase in phases if phase.name in ("start", "rollout"))
    return ((1 - SAFETY_MARGIN) * gpu.memory_gib * GIB - others) / (1 + assumed.fragmentation)


def _beside_cache(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> float:
    """Return the bytes of all parts of an engine except its cache."""
    engine = engine_memory(config, dimensions, gpu)
    return engine.total - engine.kv_cache


def _trajectories_per_engine(rollout: RolloutConfig, gpus: int) -> float:
    prompts = rollout.prompts_per_step + rollout.partial.extra_prompts
    return prompts * rollout.group_size * rollout.tensor_parallel / gpus


def _with(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **values))


def _down(gib: float) -> float:
    return math.floor(gib / STEP_GIB) * STEP_GIB


def _up(gib: float) -> float:
    return math.ceil(gib / STEP_GIB) * STEP_GIB
