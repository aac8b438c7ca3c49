"""Predict how long a step takes to copy the trainer's state between the GPUs and their hosts.

`update.offload` moves state between the phases of a step. An extrapolated update copies state in both directions.
"""

from __future__ import annotations

from itertools import pairwise

from a2tgpo.memory.residency import resident
from a2tgpo.plan.inputs import PlanInputs
from a2tgpo.plan.memory import TrainerMemory, trainer_memory

STEP = ("refit", "rollout", "score", "update", "refit")
"""The memory phases of a step, and the first phase of the next step."""


def transfer_bytes(given: PlanInputs) -> float:
    """Return the bytes that one rank copies to or from its host in a step.

    The rank belongs to the pipeline stage that copies the most. Gradients are not copied, because they come back as
    zeros.
    """
    replicas = given.geometry.data_parallel
    return max(
        _copied(given, trainer_memory(given.config, given.dimensions, stage=stage, data_parallel=replicas))
        for stage in range(given.config.parallel.pipeline)
    )


def transfer_time(given: PlanInputs) -> float:
    """Return the seconds that the copies of a step take. All GPUs of a node copy at once, each over its own link."""
    return transfer_bytes(given) / (1e9 * given.gpu.host_gb_per_s * given.assumed.link_utilisation)


def _copied(given: PlanInputs, memory: TrainerMemory) -> float:
    sizes = {
        "weights": memory.weights,
        "optimizer": memory.master_weights + memory.moments,
        "reference": memory.reference,
    }
    phases = [resident(phase, offload=given.config.update.offload) for phase in STEP]
    moved = [part for before, after in pairwise(phases) for part in before ^ after]
    copied = sum(sizes.get(part, 0.0) for part in moved)
    if given.config.update.extrapolation.is_on:
        copied += 2 * memory.before_update * given.geometry.optimizer_steps
    return copied
