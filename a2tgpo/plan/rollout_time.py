"""Seconds that the rollout and the refit take."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES, engine_dtype, engine_weight_bytes, kv_bytes_per_token
from a2tgpo.plan.flops import forward_flops
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.parameters import checkpoint_parameters
from a2tgpo.plan.workload import Geometry, Workload


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """One engine's share of a step, seconds."""

    prefill: float
    """Prompts, once per group where an engine plays a whole one, and observations."""
    decode: float
    """With as many trajectories in flight as the engine takes."""
    tail: float
    """The longest trajectories, after those of mean length are done, their tool calls included."""
    gain: float
    """Scoring the gold answer after every turn, on the cached prefix."""

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode + self.tail + self.gain


def rollout_time(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    geometry: Geometry,
    workload: Workload,
    assumed: Assumptions,
) -> RolloutTime:
    """What an engine takes to play its share."""
    tensor = config.rollout.tensor_parallel
    peak = gpu.peak_flops(engine_dtype(config)) * assumed.prefill_utilisation * tensor
    flops = forward_flops(dimensions, context=workload.tokens / 2)
    # Operations in FP8 count as the bfloat16 ones that take as long.
    linear_speed = 1.0 if config.rollout.quantization == "none" else assumed.fp8_speed
    forward = (flops.linear + flops.experts) / linear_speed + flops.attention + flops.output
    bandwidth = 1e12 * gpu.memory_tb_per_s * assumed.memory_utilisation
    per_token = kv_bytes_per_token(config, dimensions)

    def step_seconds(running: float, context: float) -> float:
        """One decoding step with `running` trajectories of `context` tokens."""
        weights = engine_weight_bytes(config, dimensions, experts_share=_experts_read(dimensions, running))
        memory = (weights + running * context * per_token) / bandwidth
        latency = 2 * dimensions.layers * assumed.collective_latency_s if tensor > 1 else 0.0
        host = assumed.decode_step_s + running * assumed.decode_sequence_s
        return max(memory, running * forward / peak) + latency + host

    trajectories, sampled = geometry.trajectories_per_engine, workload.sampled_tokens
    prompts = max(1.0, trajectories / config.rollout.group_size)
    observed = workload.response_tokens - sampled
    context = workload.prompt_tokens + workload.response_tokens / 2
    steps = max(sampled, trajectories * sampled / geometry.concurrent)
    few = max(1.0, assumed.tail_concurrency * geometry.concurrent)
    tail_steps = max(0.0, geometry.longest_sampled - sampled)
    # An observation's share grows with the trajectory, and so do tool calls.
    stretch = geometry.longest_sampled / sampled if sampled else 1.0
    scored = (workload.turns + 1) * assumed.answer_tokens * trajectories if workload.turns else 0.0
    return RolloutTime(
        prefill=(prompts * workload.prompt_tokens + trajectories * observed) * forward / peak,
        decode=steps * step_seconds(min(geometry.concurrent, trajectories), context),
        tail=tail_steps * step_seconds(few, workload.prompt_tokens + workload.response_tokens * stretch / 2)
        + workload.turns * stretch * workload.tool_seconds,
        gain=scored * forward / peak,
    )


def _experts_read(dimensions: ModelDimensions, running: float) -> float:
    """Share of a layer's experts that at least one of `running` tokens chooses, were the choice even."""
    if not dimensions.experts:
        return 1.0
    return 1 - (1 - dimensions.experts_per_token / dimensions.experts) ** running


def refit_bytes(config: RunConfig, dimensions: ModelDimensions) -> float:
    """Weights that every rank is given in full."""
    return checkpoint_parameters(dimensions) * ELEMENT_BYTES[config.model.dtype]


def refit_time(
    config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, gpus: int, assumed: Assumptions
) -> float:
    """Broadcast over the stages and gather over tensor- or expert-parallel ranks, one after the other; the engine's
    copying of what came before takes place beside them."""
    parallel, size = config.parallel, refit_bytes(config, dimensions)
    copying = 2 * size / (1e12 * gpu.memory_tb_per_s * assumed.memory_utilisation)
    seconds = 0.0
    if parallel.pipeline > 1:
        seconds += size / parallel.tensor / (gpu.link_bytes_per_s(gpus) * assumed.link_utilisation)
    if parallel.tensor > 1:
        link = gpu.link_bytes_per_s(parallel.tensor) * assumed.link_utilisation
        seconds += size * (1 - 1 / parallel.tensor) / link
    if parallel.expert > 1:
        link = gpu.link_bytes_per_s(parallel.expert) * assumed.link_utilisation
        seconds += size * (1 - 1 / parallel.expert) / link
    return max(seconds, copying)
