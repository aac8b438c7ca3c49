"""Seconds of scoring and update: computation, pipeline bubble, communication."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import EXPERT_CROWDING, FLOAT32_BYTES
from a2tgpo.plan.flops import TokenFlops, forward_flops
from a2tgpo.plan.inputs import PlanInputs
from a2tgpo.plan.parameters import optimizer_parameters, stage_parameters

OPTIMIZER_BYTES = 30
"""Bytes that an optimizer step reads and writes per parameter of its shard: reads the gradient, reads and writes the
master weight and two moments, writes the new weight.
"""
PERMUTATIONS = 8
"""How often a pass reads or writes a routed token in GPU memory, without the matrix products: it sorts tokens by
rank, by expert, back by rank, and into the original order; each sort reads and writes them.
"""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of all micro-batches of a step on one rank. The fields add up to the total."""

    compute: float
    """Matrix products and attention of the slowest stage."""
    bubble: float
    """Idle time of stages at the start and the end of each optimizer step."""
    tensor: float
    """Tensor-parallel collectives, not overlapped."""
    pipeline: float
    """Sends between stages."""
    context: float = 0.0
    """Sending keys and values around the context-parallel ranks, not overlapped."""
    dispatch: float = 0.0
    """Sorting tokens by expert, sending them to the experts' ranks and back, not overlapped."""
    data: float = 0.0
    """Reduction of gradients and gathering of weights over the data-parallel ranks, not overlapped."""
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
    """All-to-all between tokens' ranks and experts' ranks."""


def score_time(given: PlanInputs) -> PassTime:
    """Return the time of one forward pass over the step's tokens."""
    return _pass_time(given, layer_passes=1, output_passes=1, collectives=2)


def update_time(given: PlanInputs) -> PassTime:
    """Return the time of forward, backward and optimizer steps over the step's tokens."""
    parallel, geometry = given.config.parallel, given.geometry
    passes = _pass_time(
        given,
        layer_passes=_update_passes(given.config),
        output_passes=3,
        collectives=_update_collectives(given.config),
    )
    fullest = stage_parameters(given.dimensions, parallel, 0)
    shard = float(fullest.total)
    if given.config.update.distributed_optimizer:
        shard = optimizer_parameters(fullest, parallel, geometry.data_parallel)
    rate = given.link_bytes_per_s(parallel.tensor * parallel.context * geometry.data_parallel)
    return dataclasses.replace(
        passes,
        data=update_volume(given).data / rate,
        optimizer=shard * OPTIMIZER_BYTES / given.memory_bytes_per_s * geometry.optimizer_steps,
    )


def update_volume(given: PlanInputs) -> Volume:
    """Return the bytes that one rank of the first stage sends in one step's update."""
    config, geometry, parallel = given.config, given.geometry, given.config.parallel
    count = geometry.microbatches * geometry.optimizer_steps
    parameters = stage_parameters(given.dimensions, parallel, 0)
    replicas = parallel.context * geometry.data_parallel
    expert_replicas = parallel.tensor * replicas / parallel.expert
    reduced = parameters.dense * (1 - 1 / replicas)
    reduced += parameters.experts * (1 - 1 / expert_replicas)
    passes = _update_passes(config)
    gradient_and_weight = FLOAT32_BYTES + given.element_bytes
    if not config.update.distributed_optimizer:
        gradient_and_weight = 2 * FLOAT32_BYTES  # an all-reduce of gradients
    return Volume(
        tensor=count * _update_collectives(config) * _tensor_bytes(given),
        context=count * passes * _ring_bytes(given),
        pipeline=count * 2 * _boundary_bytes(given),
        data=geometry.optimizer_steps * reduced * gradient_and_weight,
        expert=count * passes * _dispatch_bytes(given),
    )


def _update_passes(config: RunConfig) -> int:
    """Return the cost of a layer in forward passes: the backward pass counts as two, recomputation as one more."""
    return 4 if config.model.recompute == "full" else 3


def _update_collectives(config: RunConfig) -> int:
    """Return the collectives of a layer: two in the forward pass, two in the backward pass. Sequence parallelism
    gathers two inputs once more, each worth half a collective.
    """
    return 4 + (2 if config.model.recompute == "full" else 0) + (1 if config.parallel.sequence else 0)


def _tensor_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends in one all-reduce (or reduce-scatter and all-gather) per layer of its
    stage.
    """
    hidden_states = given.geometry.rank_tokens * given.dimensions.hidden * given.element_bytes
    return _most_layers(given) * 2 * (1 - 1 / given.config.parallel.tensor) * hidden_states


def _most_layers(given: PlanInputs) -> int:
    """Return the number of layers of the largest stage."""
    return max(given.config.parallel.stage_layers(given.dimensions.layers))


def _ring_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends in one pass over a micro-batch: it passes on keys and values of all other
    ranks.

    The backward pass sends keys and values again, together with their gradients, and so counts as two passes.
    """
    width = 2 * given.dimensions.kv_width / given.config.parallel.tensor
    others = given.config.parallel.context - 1
    return _most_layers(given) * others * given.geometry.rank_tokens * width * given.element_bytes


def _boundary_bytes(given: PlanInputs) -> float:
    """Return the bytes of one micro-batch's hidden states that a rank sends to the next stage, once for each
    chunk.
    """
    parallel = given.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    cut = parallel.tensor if parallel.sequence else 1
    sent = given.geometry.rank_tokens * parallel.virtual / cut
    return sent * given.dimensions.hidden * given.element_bytes


def _dispatch_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends to experts and back in one pass over a micro-batch, for all layers of its
    stage.

    A token is sent once per chosen expert, even if a rank holds several of them; in the backward pass gradients take
    the same ways.
    """
    return _most_layers(given) * 2 * (1 - 1 / given.config.parallel.expert) * _routed_bytes(given)


def _routed_bytes(given: PlanInputs) -> float:
    """Return the bytes of a rank's tokens of a micro-batch, once per chosen expert; 0 in a dense model."""
    if not given.dimensions.experts:
        return 0.0
    tokens = given.geometry.rank_tokens / given.config.parallel.tensor * given.dimensions.experts_per_token
    return tokens * given.dimensions.hidden * given.element_bytes


def _dispatch_seconds(given: PlanInputs) -> float:
    """Return the seconds of permutations in GPU memory and of the all-to-all, for one pass over a micro-batch."""
    if not given.dimensions.experts:
        return 0.0
    expert = given.config.parallel.expert
    seconds = _most_layers(given) * PERMUTATIONS * _routed_bytes(given) / given.memory_bytes_per_s
    if expert > 1:
        # Expert-parallel ranks are neighbours: they share a node if a node has at least as many GPUs.
        seconds += _dispatch_bytes(given) / given.link_bytes_per_s(expert)
    return seconds * _expert_wait(given.config)


def _expert_wait(config: RunConfig) -> float:
    """Return the experts' time relative to an even distribution; a rank that holds all experts is always even."""
    return EXPERT_CROWDING if config.parallel.expert > 1 else 1.0


def _pass_time(given: PlanInputs, *, layer_passes: int, output_passes: int, collectives: int) -> PassTime:
    """Return the time of a step's micro-batches, each with the layers' work of `layer_passes` forward passes."""
    parallel, workload, geometry = given.config.parallel, given.workload, given.geometry
    flops = forward_flops(given.dimensions, context=workload.tokens / 2, output_share=workload.output_share)
    by_stage = [layer_passes * _stage_operations(given, flops, stage) for stage in range(parallel.pipeline)]
    by_stage[-1] += output_passes * flops.output
    slowest = max(by_stage)
    peak = given.gpu.peak_flops(given.config.model.dtype)
    rate = peak * given.assumed.compute_utilisation * parallel.tensor
    one_compute = geometry.rank_tokens * slowest / rate * (1 + given.assumed.imbalance)
    one_tensor = 0.0
    if parallel.tensor > 1:
        one_tensor = collectives * _tensor_bytes(given) / given.link_bytes_per_s(parallel.tensor)
    one_dispatch = layer_passes * _dispatch_seconds(given)
    ring_rate = given.link_bytes_per_s(parallel.tensor * parallel.context)
    one_ring = layer_passes * _ring_bytes(given) / ring_rate
    directions = 2 if layer_passes > 1 else 1
    # Stages are furthest apart in rank order, so a boundary crosses nodes unless one node holds all ranks.
    one_boundary = directions * _boundary_bytes(given) / given.link_bytes_per_s(given.gpus)
    count, steps = geometry.microbatches, geometry.optimizer_steps
    # An interleaved stage waits only for a chunk of the previous stage.
    waits = (parallel.pipeline - 1) / parallel.virtual
    return PassTime(
        compute=steps * count * one_compute,
        bubble=steps * waits * (one_compute + one_tensor + one_ring + one_boundary + one_dispatch),
        context=steps * count * one_ring,
        tensor=steps * count * one_tensor,
        pipeline=steps * count * one_boundary,
        dispatch=steps * count * one_dispatch,
    )


def _stage_operations(given: PlanInputs, flops: TokenFlops, stage: int) -> float:
    """Return a token's forward operations in a stage's layers, with FP8 converted to bfloat16 of equal duration."""
    parallel, fp8, all_layers = given.config.parallel, given.config.model.fp8, given.dimensions.layers
    layers = parallel.stage_layers(all_layers)[stage]
    in_fp8 = layers - fp8.bf16_layers(stage, parallel.pipeline) if fp8.enabled else 0
    linear = flops.linear + flops.experts * _expert_wait(given.config)
    operations = layers * flops.attention + (layers - in_fp8 + in_fp8 / given.assumed.fp8_speed) * linear
    return operations / all_layers
