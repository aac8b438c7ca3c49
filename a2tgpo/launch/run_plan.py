"""The plan of a run on its GPUs, as printed by the dry run and checked by the pre-flight."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from a2tgpo.config.run import RunConfig

if TYPE_CHECKING:
    from a2tgpo.plan.hardware import Gpu
    from a2tgpo.plan.plan import Plan


def plan_of_run(config: RunConfig, *, num_gpus: int) -> tuple[Plan, str, str]:
    """Return the plan on `num_gpus` GPUs like the one here, and the sources of the model's dimensions and the GPU."""
    from a2tgpo.plan.dimensions import model_dimensions
    from a2tgpo.plan.plan import make_plan

    dimensions, source = model_dimensions(config.model.path)
    gpu, card = card_to_plan_for(config)
    return make_plan(config, dimensions, gpu, gpus=num_gpus), source, card


def card_to_plan_for(config: RunConfig) -> tuple[Gpu, str]:
    """Return this machine's GPU, or without one the configuration's GPU; and a description of the choice."""
    import torch

    from a2tgpo.plan.hardware import GIB, GPUS

    meant = GPUS[config.cluster.gpu]
    if not torch.cuda.is_available():
        return meant, f"{meant.name} (cluster.gpu; this machine has no visible GPU)"
    found = torch.cuda.get_device_properties(0)
    here = dataclasses.replace(meant, memory_gib=found.total_memory / GIB)
    return here, f"{found.name} (speed of {meant.name}: cluster.gpu)"
