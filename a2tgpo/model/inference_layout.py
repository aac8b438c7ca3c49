"""Choose a model's layout for inference or conversion, independently of the layout of its training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from typing import Any

import torch
from transformers import PretrainedConfig

from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.experts import has_experts
from a2tgpo.model.transformer_config import check_layout

MEMORY_FRACTION = 0.85
"""The engine's share of a GPU's memory if the GPU holds no optimizer state."""
LAYOUT: dict[str, Any] = {
    "tensor": 1,
    "sequence": False,
    "context": 1,
    "expert": 1,
    "pipeline": 1,
    "virtual": 1,
    "first_stage_layers": 0,
    "last_stage_layers": 0,
}
"""The fields of `ParallelConfig` that divide a model, with the values of an undivided model."""
UNDIVIDED = [f"parallel.{name}={str(value).lower()}" for name, value in LAYOUT.items()]
"""Overrides that set the values of `LAYOUT` in a run's configuration."""


def inference_config(
    config: RunConfig, hf_config: PretrainedConfig, *, world_size: int, explicit: Set[str] = frozenset()
) -> RunConfig:
    """Return `config` with the layout in which `world_size` processes run or convert the model.

    The trainer's model is divided over as many tensor-parallel processes as its sizes allow. Its experts are divided
    over as many processes as their number allows. The model has one pipeline stage, uses no FP8, and replays
    no experts. An engine has gcd(`rollout.tensor_parallel`, `world_size`) processes and uses `MEMORY_FRACTION` of
    each GPU.

    Args:
        config: a run's configuration with the overrides `UNDIVIDED`.
        explicit: dotted keys of the settings that are taken from `config` unchanged.

    Raises:
        ConfigError: with a one-line message, if a parallel size in `explicit` does not divide the model's sizes.
    """
    rollout = _engine(config.rollout, world_size, explicit)
    parallel = _parallel(config.parallel, hf_config, world_size, explicit)
    model = dataclasses.replace(config.model, fp8=Fp8Config())
    return dataclasses.replace(config, model=model, parallel=parallel, rollout=rollout)


def _parallel(
    parallel: ParallelConfig, hf_config: PretrainedConfig, world_size: int, explicit: Set[str]
) -> ParallelConfig:
    given = {name: getattr(parallel, name) for name in LAYOUT if f"parallel.{name}" in explicit}
    room = world_size // (given.get("context", 1) * given.get("pipeline", 1))
    sizes = [given["tensor"]] if "tensor" in given else [t for t in range(room, 1, -1) if room % t == 0] + [1]
    experts = hf_config.num_experts if has_experts(hf_config) else 1
    for tensor in sizes:
        chosen: dict[str, Any] = {
            "tensor": tensor,
            "sequence": tensor > 1 and experts > 1,  # Megatron's experts require sequence parallelism
            "expert": math.gcd(experts, world_size // given.get("pipeline", 1)),
        }
        candidate = dataclasses.replace(parallel, **LAYOUT | chosen | given)
        try:
            check_layout(hf_config, candidate, Fp8Config())
        except ConfigError:
            if tensor == sizes[-1]:
                raise
        else:
            return candidate
    raise AssertionError("the last size is returned or refused")


def _engine(rollout: RolloutConfig, world_size: int, explicit: Set[str]) -> RolloutConfig:
    size, fraction, cache = rollout.tensor_parallel, rollout.gpu_memory_fraction, rollout.kv_cache_gib
    if "rollout.tensor_parallel" not in explicit:
        size = math.gcd(size, world_size)
    if torch.cuda.is_available() and "rollout.gpu_memory_fraction" not in explicit:
        fraction = MEMORY_FRACTION
    if "rollout.kv_cache_gib" not in explicit:
        # On a GPU, the KV cache takes the memory that the weights leave free. On a CPU, the engine's cache keeps its
        # total size, so a rank's part grows if the engine has fewer ranks than `rollout.tensor_parallel`.
        cache = 0.0 if torch.cuda.is_available() else cache * rollout.tensor_parallel / size
    return dataclasses.replace(
        rollout,
        tensor_parallel=size,
        gpu_memory_fraction=fraction,
        kv_cache_gib=cache,
        router_replay=False,
    )
