"""Predict how many seconds a rollout takes, and how many seconds a refit takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import engine_dtype, engine_weight_bytes, kv_bytes_per_token
from a2tgpo.plan.flops import forward_flops
from a2tgpo.plan.inputs import PlanInputs
from a2tgpo.plan.parameters import checkpoint_parameters


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Seconds that an engine takes for its share of a step's trajectories."""

    prefill: float
    """Seconds to compute prompts and observations. A group's prompt is computed once."""
    decode: float
    """Seconds of decoding while the engine runs as many trajectories as it can."""
    tail: float
    """Seconds of decoding and tool calls after all but the longest trajectories have ended."""
    gain: float
    """Seconds to score the gold answer after every turn. The prefix is already in the cache."""
    recompute: float
    """Seconds to compute lost contexts again, because the cache cannot hold all trajectories in flight."""

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode + self.tail + self.gain + self.recompute


def rollout_time(given: PlanInputs) -> RolloutTime:
    """Return the time that an engine takes for its share of a step's trajectories."""
    config, dimensions, assumed = given.config, given.dimensions, given.assumed
    geometry, workload = given.geometry, given.workload
    tensor = config.rollout.tensor_parallel
    peak = given.gpu.peak_flops(engine_dtype(config)) * assumed.prefill_utilisation * tensor
    flops = forward_flops(dimensions, context=workload.tokens / 2)
    # Convert FP8 operations to the number of bfloat16 operations that take the same time.
    linear_speed = 1.0 if config.rollout.quantization == "none" else assumed.fp8_speed
    forward = (flops.linear + flops.experts) / linear_speed + flops.attention + flops.output
    per_token = kv_bytes_per_token(config, dimensions)

    def step_seconds(running: float, context: float) -> float:
        """Return the seconds of a decoding step with `running` trajectories of `context` tokens each."""
        weights = engine_weight_bytes(config, dimensions, experts_share=_experts_read(dimensions, running))
        memory = (weights + running * context * per_token) / given.memory_bytes_per_s
        latency = 2 * dimensions.layers * assumed.collective_latency_s if tensor > 1 else 0.0
        host = assumed.decode_step_s + running * assumed.decode_sequence_s
        return max(memory, running * forward / peak) + latency + host

    prompts = max(1.0, geometry.trajectories_per_engine / config.rollout.group_size)
    # For a branch, count only the part that the branch itself plays.
    trajectories = geometry.trajectories_per_engine * geometry.played_share
    sampled = workload.sampled_tokens
    observed = workload.response_tokens - sampled
    context = workload.prompt_tokens + workload.response_tokens / 2
    steps = max(sampled, trajectories * sampled / geometry.concurrent)
    few = max(1.0, assumed.tail_concurrency * geometry.concurrent)
    tail_steps = max(0.0, geometry.longest_sampled - sampled)
    # Observations and tool calls are assumed to grow in proportion to the sampled tokens.
    stretch = geometry.longest_sampled / sampled if sampled else 1.0
    is_scored = workload.turns > 0 and config.engine_scores_gain
    with_gains = geometry.trajectories_per_engine * min(1.0, geometry.played_share)
    scored = (workload.turns + 1) * assumed.answer_tokens * with_gains if is_scored else 0.0
    # A trajectory without room in the cache loses its cached context in each turn. Either a preemption drops the
    # context, or other trajectories take its place while the tool runs.
    recomputed = geometry.displaced * (workload.turns + 1) * context
    return RolloutTime(
        prefill=(prompts * workload.prompt_tokens + trajectories * observed) * forward / peak,
        decode=steps * step_seconds(min(geometry.concurrent, trajectories), context),
        tail=tail_steps * step_seconds(few, workload.prompt_tokens + workload.response_tokens * stretch / 2)
        + workload.turns * stretch * workload.tool_seconds,
        gain=scored * forward / peak,
        recompute=recomputed * forward / peak,
    )


def rollout_time_with_room(given: PlanInputs) -> RolloutTime:
    """Return the time that the rollout would take if the cache held all trajectories in flight."""
    roomy = dataclasses.replace(given.geometry, concurrent=given.geometry.in_flight)
    return rollout_time(dataclasses.replace(given, geometry=roomy))


def _experts_read(dimensions: ModelDimensions, running: float) -> float:
    """Return the share of a layer's experts that at least one of `running` tokens chooses, if choices are uniform."""
    if not dimensions.experts:
        return 1.0
    return 1 - (1 - dimensions.experts_per_token / dimensions.experts) ** running


def refit_bytes(given: PlanInputs) -> float:
    """Return the bytes of the full weights. Every rank receives this many bytes in a refit."""
    return checkpoint_parameters(given.dimensions) * given.element_bytes


def refit_time(given: PlanInputs) -> float:
    """Return the seconds of a refit.

    Weights are broadcast over the stages, then gathered over the tensor-parallel or expert-parallel ranks. Meanwhile,
    the engine copies the previous bucket.
    """
    parallel, size = given.config.parallel, refit_bytes(given)
    seconds = 0.0
    if parallel.pipeline > 1:
        seconds += size / parallel.tensor / given.link_bytes_per_s(given.gpus)
    for ranks in (parallel.tensor, parallel.expert):
        if ranks > 1:
            seconds += size * (1 - 1 / ranks) / given.link_bytes_per_s(ranks)
    return max(seconds, 2 * size / given.memory_bytes_per_s)
