"""Make the plan of a run on its GPUs, and compare the plan with the GPUs' memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.hardware import GIB, GPUS, Gpu

if TYPE_CHECKING:
    from a2tgpo.plan.plan import Plan


def plan_of_run(config: RunConfig, *, num_gpus: int) -> tuple[Plan, str, str]:
    """Return a plan for `num_gpus` GPUs; the source of the model's dimensions; and the name of the GPU."""
    from a2tgpo.plan.dimensions import model_dimensions
    from a2tgpo.plan.plan import make_plan

    dimensions, source = model_dimensions(config.model.path)
    gpu, card = card_to_plan_for(config)
    return make_plan(config, dimensions, gpu, gpus=num_gpus), source, card


def check_memory(plan: Plan, *, has_engine: bool) -> str:
    """Return a warning of one line if the plan exceeds the memory of a GPU, or an empty string if the plan fits.

    Args:
        has_engine: whether the program has an engine. If it has none, only the memory of the update is checked.

    Raises:
        ConfigError: with a one-line message, if the excess over the GPU's memory is more than `cluster.plan_margin`
            times that memory (0: never), or if `rollout.kv_cache_gib` is too small for one sequence.
    """
    cache_fault = ""
    if has_engine and not plan.holds_a_sequence:
        key = "kv_cache_gib" if plan.given_config.rollout.kv_cache_gib else "gpu_memory_fraction"
        cache_fault = (
            f"rollout.{key} is {getattr(plan.config.rollout, key):g}, too little for a cache of one sequence "
            f"({plan.config.max_model_len} tokens); tools/plan.py CONFIG shows what takes the memory"
        )
        if key == "kv_cache_gib":
            raise ConfigError(cache_fault)
    phases = [phase for phase in plan.phases if has_engine or phase.name == "update"]
    worst = min(phases, key=lambda phase: phase.headroom)
    if worst.fits:
        return cache_fault
    line = (
        f"the plan does not fit {plan.gpus} x {plan.gpu.memory_gib:.0f} GiB of GPU memory: {worst.name} takes "
        f"{worst.peak / GIB:.0f} GiB of each; tools/plan.py CONFIG --suggest looks for a layout"
    )
    if plan.config.cluster.refuses(worst.peak, worst.capacity):
        raise ConfigError(f"{line}; cluster.plan_margin=0 starts all the same")
    return line


def card_to_plan_for(config: RunConfig) -> tuple[Gpu, str]:
    """Return this machine's GPU, or the configured GPU if this machine has none; and a description of that GPU."""
    import torch

    meant = GPUS[config.cluster.gpu]
    if not torch.cuda.is_available():
        return meant, f"{meant.name} (cluster.gpu; this machine has no visible GPU)"
    found = torch.cuda.get_device_properties(0)
    here = dataclasses.replace(meant, memory_gib=found.total_memory / GIB)
    return here, f"{found.name} (speed of {meant.name}: cluster.gpu)"
