"""Find the layouts with which a configuration fits a cluster, and sort them by speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product

from a2tgpo.config.model import Recompute
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions, layout_fault
from a2tgpo.plan.engine import engine_fault
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.plan import Plan, make_plan
from a2tgpo.plan.precision import precision_fault
from a2tgpo.plan.workload import Workload

PIPELINE_SIZES = (1, 2, 4, 8, 16)
TENSOR_SIZES = (1, 2, 4, 8)
"""Sizes of tensor-parallel groups. None exceeds 8, so that a group stays inside a node."""
EXPERT_SIZES = (1, 2, 4, 8, 16, 32)
VIRTUAL_SIZES = (1, 2, 4)
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
MICROBATCH_TOKENS = (8192, 16384, 32768)
LEAST_HEADROOM = 0.05
"""Share of GPU memory that every phase must leave free, because plans are not measurements."""


def suggest(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    *,
    gpus: int,
    workload: Workload | None = None,
    assumed: Assumptions | None = None,
) -> list[Plan]:
    """Return the plans that leave LEAST_HEADROOM free in every phase, sorted by predicted step time.

    The search varies model.recompute, rollout.tensor_parallel, update.max_microbatch_tokens and all settings of
    parallel.* except parallel.context. Of plans that differ only in their virtual chunks, recomputation or
    micro-batches, only the best plan is returned.
    """
    best: dict[tuple, Plan] = {}
    for candidate in _candidates(config, dimensions, gpu, gpus):
        plan = make_plan(candidate, dimensions, gpu, gpus=gpus, workload=workload, assumed=assumed)
        if not plan.fits or min(phase.headroom for phase in plan.phases) < LEAST_HEADROOM:
            continue
        parallel = candidate.parallel
        pair = (
            parallel.tensor,
            parallel.pipeline,
            parallel.expert,
            candidate.rollout.tensor_parallel,
        )
        if pair not in best or _order(plan) < _order(best[pair]):
            best[pair] = plan
    return sorted(best.values(), key=_order)


def overrides(plan: Plan) -> list[str]:
    """Return the command-line overrides that set the layout of `plan`."""
    config = plan.given_config
    return [
        f"parallel.tensor={config.parallel.tensor}",
        f"parallel.pipeline={config.parallel.pipeline}",
        f"parallel.virtual={config.parallel.virtual}",
        "parallel.first_stage_layers=0",
        "parallel.last_stage_layers=0",
        f"parallel.expert={config.parallel.expert}",
        f"parallel.sequence={str(config.parallel.sequence).lower()}",
        f"model.recompute={config.model.recompute}",
        f"rollout.tensor_parallel={config.rollout.tensor_parallel}",
        f"rollout.gpu_memory_fraction={config.rollout.gpu_memory_fraction:g}",
        f"rollout.kv_cache_gib={config.rollout.kv_cache_gib:g}",
        f"update.max_microbatch_tokens={config.update.max_microbatch_tokens}",
    ]


def _order(plan: Plan) -> tuple[float, float]:
    """Return a sort key: the step time rounded to 0.1 s, then the fullest phase's headroom (largest first)."""
    return round(plan.step_seconds, 1), -min(phase.headroom for phase in plan.phases)


def _candidates(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, gpus: int) -> Iterator[RunConfig]:
    engines = [size for size in TENSOR_SIZES if size <= gpu.gpus_per_node]
    experts = EXPERT_SIZES if dimensions.experts else (1,)
    stages = [
        (pipeline, virtual)
        for pipeline, virtual in product(PIPELINE_SIZES, VIRTUAL_SIZES)
        if pipeline > 1 or virtual == 1
    ]
    for tensor, (pipeline, virtual), expert, engine in product(engines, stages, experts, engines):
        parallel = dataclasses.replace(
            config.parallel,
            tensor=tensor,
            pipeline=pipeline,
            virtual=virtual,
            first_stage_layers=0,
            last_stage_layers=0,
            expert=expert,
            sequence=tensor > 1,
        )
        if layout_fault(dimensions, parallel, gpus):
            continue
        rollout = dataclasses.replace(
            config.rollout, tensor_parallel=engine, gpu_memory_fraction=0.0, kv_cache_gib=0.0
        )
        laid_out = dataclasses.replace(config, parallel=parallel, rollout=rollout)
        if engine_fault(laid_out, dimensions, gpus) or precision_fault(laid_out, dimensions, gpu):
            continue
        for recompute, tokens in product(RECOMPUTE, MICROBATCH_TOKENS):
            yield dataclasses.replace(
                laid_out,
                model=dataclasses.replace(config.model, recompute=recompute),
                update=dataclasses.replace(config.update, max_microbatch_tokens=tokens),
            )
