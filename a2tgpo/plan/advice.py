"""Explain why a plan does not fit, and find the smallest change that makes it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.host_memory import HostMemory
from a2tgpo.plan.plan import Plan, make_plan
from a2tgpo.plan.rollout_time import rollout_time_with_room


def faults(plan: Plan) -> list[str]:
    """Return one line, with a remedy, for each reason why the plan does not fit; an empty list if it fits."""
    lines = []
    for phase in plan.phases:
        if not phase.fits:
            over = (phase.peak - phase.capacity) / GIB
            lines.append(
                f"{phase.name}: {phase.peak / GIB:.1f} GiB on a rank of stage {phase.stage}, {over:.1f} GiB more "
                f"than the card's {phase.capacity / GIB:.1f} GiB; {_change(plan, phase.name)}"
            )
    if not plan.holds_a_sequence:
        lines.append(
            f"rollout: an engine's KV cache holds {max(0, plan.geometry.kv_tokens)} tokens, less than one sequence "
            f"of {plan.config.max_model_len}; {_change(plan, 'rollout')}"
        )
    if not plan.fits_on_hosts:
        lines.append(
            f"host: {host_needs(plan.host)}, but the node has {plan.gpu.host_memory_gib:.0f} GiB; "
            f"{host_change(plan.config)}"
        )
    return lines


def cache_shortage(plan: Plan) -> str:
    """Return a text with the cost of a cache that is too small, and a remedy; "" if all sequences in flight fit."""
    geometry = plan.geometry
    if geometry.concurrent == geometry.in_flight:
        return ""
    lost = plan.rollout.seconds / rollout_time_with_room(plan).seconds - 1
    more = "raise rollout.tensor_parallel" if plan.share_is_chosen else "raise the engine's share of the card"
    return (
        f"rollout: {geometry.in_flight} sequences in flight, cache for {geometry.concurrent} of mean length: about "
        f"{geometry.displaced:,.0f} preemptions per engine and step, {lost:.0%} more rollout time; {more} or lower "
        f"rollout.max_concurrent"
    )


def host_needs(memory: HostMemory) -> str:
    """Return a text that says how much host memory the ranks need for each purpose."""
    copies = f"{memory.before_update / GIB:.0f} for what precedes an extrapolated update, "
    experts = f"{memory.experts / GIB:.0f} for the experts of router replay, "
    return (
        f"{memory.total / GIB:.0f} GiB of a node's memory are needed ({memory.offloaded / GIB:.0f} for what leaves "
        f"the cards, {memory.saving / GIB:.0f} for a checkpoint being written, "
        f"{copies if memory.before_update else ''}{experts if memory.experts else ''}"
        f"{memory.processes / GIB:.0f} for processes)"
    )


def host_change(config: RunConfig) -> str:
    """Return the settings to change so that the ranks of a node need less host memory."""
    offload = "set update.offload=false, " if config.update.offload else ""
    shard = "" if config.update.distributed_optimizer else "set update.distributed_optimizer=true, "
    plain = "set update.extrapolation.horizon=0, " if config.update.extrapolation.is_on else ""
    return f"{plain}{offload}{shard}raise parallel.tensor, or use more nodes"


def _change(plan: Plan, phase_name: str) -> str:
    """Return the first setting that makes the whole plan fit. If none does, return the first with which phase
    `phase_name` fits."""
    mends_phase = None
    for settings, config in _changes(plan.given_config, has_experts=bool(plan.dimensions.experts)):
        try:
            changed = make_plan(
                config,
                plan.dimensions,
                plan.gpu,
                gpus=plan.gpus,
                workload=plan.workload,
                assumed=plan.assumed,
            )
        except ConfigError:  # the changed layout does not divide the model or the GPUs
            continue
        if changed.fits:
            return f"set {settings}"
        phase = next(phase for phase in changed.phases if phase.name == phase_name)
        if mends_phase is None and phase.fits and (phase_name != "rollout" or changed.holds_a_sequence):
            mends_phase = f"set {settings}, for this phase"
    return mends_phase or "no single setting is enough: use more GPUs, or a card with more memory"


def _changes(config: RunConfig, *, has_experts: bool) -> Iterator[tuple[str, RunConfig]]:
    """Yield each setting to try as text, with the changed configuration. The cheapest settings come first."""
    rollout, parallel = config.rollout, config.parallel
    if not config.update.offload:
        update = dataclasses.replace(config.update, offload=True)
        yield "update.offload=true", dataclasses.replace(config, update=update)
    if rollout.kv_cache_gib:
        for eighths in range(7, 0, -1):
            size = round(rollout.kv_cache_gib * eighths / 8, 1)
            if size > 0:
                changed = dataclasses.replace(rollout, kv_cache_gib=size)
                yield f"rollout.kv_cache_gib={size:g}", dataclasses.replace(config, rollout=changed)
    # If the configuration does not set the engine's share of the GPU, the plan has already chosen the best one.
    candidates = range(2, 20) if rollout.gpu_memory_fraction else ()
    below = [share / 20 for share in reversed(candidates) if share / 20 < rollout.gpu_memory_fraction]
    above = [share / 20 for share in candidates if share / 20 > rollout.gpu_memory_fraction]
    for fraction in below + above:
        changed = dataclasses.replace(rollout, gpu_memory_fraction=fraction)
        yield f"rollout.gpu_memory_fraction={fraction:g}", dataclasses.replace(config, rollout=changed)
    yield (
        "model.recompute=full",
        dataclasses.replace(config, model=dataclasses.replace(config.model, recompute="full")),
    )
    tokens = config.update.max_microbatch_tokens // 2
    while tokens >= config.data.max_prompt_tokens + config.rollout.max_response_tokens:
        update = dataclasses.replace(config.update, max_microbatch_tokens=tokens)
        yield f"update.max_microbatch_tokens={tokens}", dataclasses.replace(config, update=update)
        tokens //= 2
    for factor in (2, 4, 8):
        size = rollout.tensor_parallel * factor
        changed = dataclasses.replace(rollout, tensor_parallel=size)
        yield f"rollout.tensor_parallel={size}", dataclasses.replace(config, rollout=changed)
    if has_experts:
        for factor in (2, 4, 8):
            expert = parallel.expert * factor
            shared = dataclasses.replace(parallel, expert=expert)
            yield f"parallel.expert={expert}", dataclasses.replace(config, parallel=shared)
    for factor in (2, 4):
        context = parallel.context * factor
        split = dataclasses.replace(parallel, context=context)
        yield f"parallel.context={context}", dataclasses.replace(config, parallel=split)
    for factor in (2, 4, 8):
        tensor, pipeline = parallel.tensor * factor, parallel.pipeline * factor
        wider = dataclasses.replace(parallel, tensor=tensor)
        yield f"parallel.tensor={tensor}", dataclasses.replace(config, parallel=wider)
        deeper = dataclasses.replace(parallel, pipeline=pipeline)
        yield f"parallel.pipeline={pipeline}", dataclasses.replace(config, parallel=deeper)
