"""Seconds that scoring and the update take: computation, pipeline bubble, communication."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import EXPERT_CROWDING, FLOAT32_BYTES
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.flops import TokenFlops, forward_flops
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.parameters import optimizer_parameters, stage_parameters
from a2tgpo.plan.workload import Geometry, Workload

OPTIMIZER_BYTES = 30
"""Read and written per parameter of the optimizer's shard in one step: gradient, master weight and two moments, twice
each but the gradient, and the new weight."""
PERMUTATIONS = 8
"""Times that a routed token is read or written in the card's memory besides the matrix products, in one pass: sorted
by rank, by expert, back by rank, back in place; each reads and writes it."""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """All micro-batches of a step through the pipeline, seconds on every rank; stages add up."""

    compute: float
    """Matrix products and attention of the slowest stage."""
    bubble: float
    """Stages waiting at the start and at the end of every optimizer step's micro-batches."""
    tensor: float
    """Tensor-parallel collectives, not overlapped."""
    pipeline: float
    """Sends between stages."""
    context: float = 0.0
    """Keys and values around the context-parallel ranks, not overlapped."""
    dispatch: float = 0.0
    """Tokens laid out by expert, sent to the ranks that hold them and brought back, not overlapped."""
    data: float = 0.0
    """Gradients reduced and weights gathered over the data-parallel ranks, not overlapped."""
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        passes = self.compute + self.bubble + self.tensor + self.context + self.pipeline + self.dispatch
        return passes + self.data + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes that one rank sends in one step's update."""

    tensor: float
    context: float
    pipeline: float
    data: float
    expert: float
    """All-to-all to and from experts."""


def score_time(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    geometry: Geometry,
    workload: Workload,
    assumed: Assumptions,
) -> PassTime:
    """One forward pass over the step's tokens."""
    return _pass_time(
        config, dimensions, gpu, geometry, workload, assumed, layer_passes=1, output_passes=1, collectives=2
    )


def update_time(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    geometry: Geometry,
    workload: Workload,
    assumed: Assumptions,
) -> PassTime:
    """Forward, backward and optimizer steps over the step's tokens."""
    recomputes = config.model.recompute == "full"
    passes = _pass_time(
        config,
        dimensions,
        gpu,
        geometry,
        workload,
        assumed,
        layer_passes=4 if recomputes else 3,
        output_passes=3,
        # Forward two, backward two; sequence parallelism gathers two inputs once more, half a collective each.
        collectives=4 + (2 if recomputes else 0) + (1 if config.parallel.sequence else 0),
    )
    fullest = stage_parameters(dimensions, config.parallel, 0)
    shard = float(fullest.total)
    if config.update.distributed_optimizer:
        shard = optimizer_parameters(fullest, config.parallel, geometry.data_parallel)
    optimizer = shard * OPTIMIZER_BYTES / (1e12 * gpu.memory_tb_per_s * assumed.memory_utilisation)
    span = config.parallel.tensor * config.parallel.context * geometry.data_parallel
    rate = gpu.link_bytes_per_s(span) * assumed.link_utilisation
    return PassTime(
        compute=passes.compute,
        bubble=passes.bubble,
        tensor=passes.tensor,
        pipeline=passes.pipeline,
        context=passes.context,
        dispatch=passes.dispatch,
        data=update_volume(config, dimensions, geometry).data / rate,
        optimizer=optimizer * geometry.optimizer_steps,
    )


def update_volume(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> Volume:
    """What one rank of the first stage sends in one step's update."""
    recomputes = config.model.recompute == "full"
    collectives = 4 + (2 if recomputes else 0) + (1 if config.parallel.sequence else 0)
    count = geometry.microbatches * geometry.optimizer_steps
    parameters = stage_parameters(dimensions, config.parallel, 0)
    replicas = config.parallel.context * geometry.data_parallel
    expert_replicas = config.parallel.tensor * replicas / config.parallel.expert
    reduced = parameters.dense * (1 - 1 / replicas)
    reduced += parameters.experts * (1 - 1 / expert_replicas)
    passes = 4 if recomputes else 3
    gradient_and_weight = FLOAT32_BYTES + ELEMENT_BYTES[config.model.dtype]
    if not config.update.distributed_optimizer:
        gradient_and_weight = 2 * FLOAT32_BYTES  # an all-reduce of gradients
    return Volume(
        tensor=count * collectives * _tensor_bytes(config, dimensions, geometry),
        context=count * passes * _ring_bytes(config, dimensions, geometry),
        pipeline=count * 2 * _boundary_bytes(config, dimensions, geometry),
        data=geometry.optimizer_steps * reduced * gradient_and_weight,
        expert=count * passes * _dispatch_bytes(config, dimensions, geometry),
    )


def _tensor_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Sent by a rank in one all-reduce (or reduce-scatter and all-gather) per layer of its stage."""
    layers = _most_layers(config, dimensions)
    hidden_states = geometry.rank_tokens * dimensions.hidden * ELEMENT_BYTES[config.model.dtype]
    return layers * 2 * (1 - 1 / config.parallel.tensor) * hidden_states


def _most_layers(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Layers of the stage that has most."""
    return max(config.parallel.stage_layers(dimensions.layers))


def _ring_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Sent by a rank in one pass over a micro-batch: keys and values of all other context-parallel ranks, passed on.

    The backward pass sends them again, and their gradients: it counts as two.
    """
    width = 2 * dimensions.kv_width / config.parallel.tensor
    element_bytes = ELEMENT_BYTES[config.model.dtype]
    others = config.parallel.context - 1
    return _most_layers(config, dimensions) * others * geometry.rank_tokens * width * element_bytes


def _boundary_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Hidden states of one micro-batch, sent by a rank to the next stage, once from each of its chunks."""
    if config.parallel.pipeline == 1:
        return 0.0
    cut = config.parallel.tensor if config.parallel.sequence else 1
    sent = geometry.rank_tokens * config.parallel.virtual / cut
    return sent * dimensions.hidden * ELEMENT_BYTES[config.model.dtype]


def _dispatch_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Sent by a rank in one pass over a micro-batch, all layers of its stage: to the chosen experts, and back.

    A token goes once for each of them, also where a rank holds several; in the backward pass gradients go the same
    ways.
    """
    layers = _most_layers(config, dimensions)
    return layers * 2 * (1 - 1 / config.parallel.expert) * _routed_bytes(config, dimensions, geometry)


def _routed_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """A rank's tokens of a micro-batch, once for each of the experts chosen; 0 in a dense model."""
    if not dimensions.experts:
        return 0.0
    tokens = geometry.rank_tokens / config.parallel.tensor * dimensions.experts_per_token
    return tokens * dimensions.hidden * ELEMENT_BYTES[config.model.dtype]


def _dispatch_seconds(
    config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, geometry: Geometry, assumed: Assumptions
) -> float:
    """One pass over a micro-batch: permuting tokens in the card's memory, and the all-to-all."""
    if not dimensions.experts:
        return 0.0
    layers = _most_layers(config, dimensions)
    routed = layers * PERMUTATIONS * _routed_bytes(config, dimensions, geometry)
    seconds = routed / (1e12 * gpu.memory_tb_per_s * assumed.memory_utilisation)
    if config.parallel.expert > 1:
        # Neighbouring ranks: inside a node as long as there are no more of them than cards.
        link = gpu.link_bytes_per_s(config.parallel.expert) * assumed.link_utilisation
        seconds += _dispatch_bytes(config, dimensions, geometry) / link
    return seconds * _expert_wait(config)


def _expert_wait(config: RunConfig) -> float:
    """Time with experts against an even share of it; a rank that holds all experts gets what its tokens chose."""
    return EXPERT_CROWDING if config.parallel.expert > 1 else 1.0


def _pass_time(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    geometry: Geometry,
    workload: Workload,
    assumed: Assumptions,
    *,
    layer_passes: int,
    output_passes: int,
    collectives: int,
) -> PassTime:
    """All of a step's micro-batches, each running `layer_passes` forward passes' worth of layers."""
    parallel = config.parallel
    flops = forward_flops(dimensions, context=workload.tokens / 2, output_share=workload.output_share)
    by_stage = [
        layer_passes * _stage_operations(config, dimensions, flops, stage, fp8_speed=assumed.fp8_speed)
        for stage in range(parallel.pipeline)
    ]
    by_stage[-1] += output_passes * flops.output
    slowest = max(by_stage)
    rate = gpu.peak_flops(config.model.dtype) * assumed.compute_utilisation * parallel.tensor
    one_compute = geometry.rank_tokens * slowest / rate * (1 + assumed.imbalance)
    one_tensor = 0.0
    if parallel.tensor > 1:
        link = gpu.link_bytes_per_s(parallel.tensor) * assumed.link_utilisation
        one_tensor = collectives * _tensor_bytes(config, dimensions, geometry) / link
    # Stages are furthest apart in the order of ranks: a boundary lies between nodes unless one node holds all.
    world = parallel.model_ranks * geometry.data_parallel
    boundary_link = gpu.link_bytes_per_s(world) * assumed.link_utilisation
    one_dispatch = layer_passes * _dispatch_seconds(config, dimensions, gpu, geometry, assumed)
    ring_link = gpu.link_bytes_per_s(parallel.tensor * parallel.context) * assumed.link_utilisation
    one_ring = layer_passes * _ring_bytes(config, dimensions, geometry) / ring_link
    directions = 2 if layer_passes > 1 else 1
    one_boundary = directions * _boundary_bytes(config, dimensions, geometry) / boundary_link
    count, steps = geometry.microbatches, geometry.optimizer_steps
    # Interleaved stages wait for a chunk of the stage before, not for all of it.
    waits = (parallel.pipeline - 1) / parallel.virtual
    return PassTime(
        compute=steps * count * one_compute,
        bubble=steps * waits * (one_compute + one_tensor + one_ring + one_boundary + one_dispatch),
        context=steps * count * one_ring,
        tensor=steps * count * one_tensor,
        pipeline=steps * count * one_boundary,
        dispatch=steps * count * one_dispatch,
    )


def _stage_operations(
    config: RunConfig, dimensions: ModelDimensions, flops: TokenFlops, stage: int, *, fp8_speed: float
) -> float:
    """A token's forward pass through a stage's layers; those in FP8 count as the bfloat16 ones that take as long."""
    parallel, fp8 = config.parallel, config.model.fp8
    layers = parallel.stage_layers(dimensions.layers)[stage]
    in_fp8 = layers - fp8.bf16_layers(stage, parallel.pipeline) if fp8.enabled else 0
    linear = flops.linear + flops.experts * _expert_wait(config)
    operations = layers * flops.attention + (layers - in_fp8 + in_fp8 / fp8_speed) * linear
    return operations / dimensions.layers
