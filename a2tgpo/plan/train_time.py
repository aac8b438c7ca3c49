"""Predict how many seconds scoring and update take: computation, pipeline bubble, communication."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import EXPERT_CROWDING, FLOAT32_BYTES
from a2tgpo.plan.adapters import adapter_flops, trained_parameters
from a2tgpo.plan.flops import TokenFlops, forward_flops
from a2tgpo.plan.inputs import PlanInputs
from a2tgpo.plan.parameters import optimizer_parameters

OPTIMIZER_BYTES = 30
"""Bytes that an optimizer step reads and writes for each parameter whose optimizer state the rank holds.

The step reads the gradient, reads and writes the master weight and two moments, and writes the new weight.
"""
EXTRAPOLATED_PASSES = 3
"""Passes of an extrapolated update: two probe steps and a corrective step."""
PERMUTATIONS = 8
"""Number of times that a pass reads or writes each routed token in GPU memory, apart from matrix products.

The pass sorts tokens by rank, by expert, back by rank, and back into the original order. Each of these four sorts
reads and writes every token once.
"""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds that one rank takes for all micro-batches of a step. The plan assumes that no communication
    overlaps with computation."""

    compute: float
    """Seconds of matrix products and attention in the slowest pipeline stage."""
    bubble: float
    """Seconds in which a stage has nothing to compute, at the start and the end of each optimizer step."""
    tensor: float
    pipeline: float
    """Seconds to send hidden states and gradients between pipeline stages."""
    context: float = 0.0
    """Seconds to send keys and values around the context-parallel ranks."""
    dispatch: float = 0.0
    """Seconds to sort tokens by expert, and to send them to the experts' ranks and back."""
    data: float = 0.0
    """Seconds to reduce gradients and gather weights over the data-parallel ranks."""
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        passes = self.compute + self.bubble + self.tensor + self.context + self.pipeline + self.dispatch
        return passes + self.data + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes that one rank sends during the update of one step."""

    tensor: float
    context: float
    pipeline: float
    data: float
    expert: float
    """Bytes of the all-to-all between the ranks that hold tokens and the ranks that hold their experts."""


def score_time(given: PlanInputs) -> PassTime:
    """Return the time of one forward pass over all tokens of the step."""
    return _pass_time(given, layer_passes=1, weight_passes=1, output_passes=1, collectives=2)


def update_time(given: PlanInputs) -> PassTime:
    """Return the time of the forward passes, the backward passes and the optimizer steps over all tokens of the step.

    With extrapolated updates, the time is that of a step before the gate closes.
    """
    parallel, geometry, repeats = given.config.parallel, given.geometry, update_repeats(given.config)
    frozen = given.config.model.lora.enabled  # the backward pass computes no gradients of frozen weights
    layer_passes = _update_passes(given.config)
    once = _pass_time(
        given,
        layer_passes=layer_passes,
        weight_passes=layer_passes - frozen,
        output_passes=3 - frozen,
        collectives=_update_collectives(given.config),
    )
    passes = PassTime(**{name: repeats * seconds for name, seconds in vars(once).items()})
    fullest = trained_parameters(given.config, given.dimensions, 0)
    shard = float(fullest.total)
    if given.config.update.distributed_optimizer:
        shard = optimizer_parameters(fullest, parallel, geometry.data_parallel)
    rate = given.link_bytes_per_s(parallel.tensor * parallel.context * geometry.data_parallel)
    return dataclasses.replace(
        passes,
        data=update_volume(given).data / rate,
        optimizer=shard * OPTIMIZER_BYTES / given.memory_bytes_per_s * geometry.optimizer_steps * repeats,
    )


def update_repeats(config: RunConfig) -> int:
    """Return the number of optimizer steps that an update makes, each with its own forward and backward pass."""
    return EXTRAPOLATED_PASSES if config.update.extrapolation.is_on else 1


def update_volume(given: PlanInputs) -> Volume:
    """Return the bytes that a rank of the first pipeline stage sends during the update of one step."""
    config, geometry, parallel = given.config, given.geometry, given.config.parallel
    steps = geometry.optimizer_steps * update_repeats(config)
    count = geometry.microbatches * steps
    parameters = trained_parameters(config, given.dimensions, 0)
    replicas = parallel.context * geometry.data_parallel
    expert_replicas = parallel.tensor * replicas / parallel.expert
    reduced = parameters.dense * (1 - 1 / replicas)
    reduced += parameters.experts * (1 - 1 / expert_replicas)
    passes = _update_passes(config)
    gradient_and_weight = FLOAT32_BYTES + given.element_bytes
    if not config.update.distributed_optimizer:
        gradient_and_weight = 2 * FLOAT32_BYTES  # an all-reduce moves each gradient twice
    return Volume(
        tensor=count * _update_collectives(config) * _tensor_bytes(given),
        context=count * passes * _ring_bytes(given),
        pipeline=count * 2 * _boundary_bytes(given),
        data=steps * reduced * gradient_and_weight,
        expert=count * passes * _dispatch_bytes(given),
    )


def _update_passes(config: RunConfig) -> int:
    """Return the cost of a layer in an update, in forward passes. A backward pass costs as much as two forward
    passes, and recomputation as much as one.
    """
    return 4 if config.model.recompute == "full" else 3


def _update_collectives(config: RunConfig) -> int:
    """Return a layer's number of all-reduces in an update. Two gathers of sequence parallelism cost as much as one
    all-reduce."""
    return 4 + (2 if config.model.recompute == "full" else 0) + (1 if config.parallel.sequence else 0)


def _tensor_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends if each layer of its stage makes one all-reduce."""
    hidden_states = given.geometry.rank_tokens * given.dimensions.hidden * given.element_bytes
    return _most_layers(given) * 2 * (1 - 1 / given.config.parallel.tensor) * hidden_states


def _most_layers(given: PlanInputs) -> int:
    return max(given.config.parallel.stage_layers(given.dimensions.layers))


def _ring_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends to its context-parallel neighbour in one forward pass over a micro-batch.

    The rank passes on the keys and values of all other ranks. A backward pass sends twice as many bytes, because it
    also sends gradients.
    """
    width = 2 * given.dimensions.kv_width / given.config.parallel.tensor
    others = given.config.parallel.context - 1
    return _most_layers(given) * others * given.geometry.rank_tokens * width * given.element_bytes


def _boundary_bytes(given: PlanInputs) -> float:
    """Return the bytes of a micro-batch's hidden states that a rank sends to the next stage, over all chunks."""
    parallel = given.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    cut = parallel.tensor if parallel.sequence else 1
    sent = given.geometry.rank_tokens * parallel.virtual / cut
    return sent * given.dimensions.hidden * given.element_bytes


def _dispatch_bytes(given: PlanInputs) -> float:
    """Return the bytes that a rank sends to experts and back in one pass over a micro-batch.

    A token is sent once for each expert that the router chose, even if one rank holds several of these experts.
    """
    return _most_layers(given) * 2 * (1 - 1 / given.config.parallel.expert) * _routed_bytes(given)


def _routed_bytes(given: PlanInputs) -> float:
    """Return the bytes of a rank's tokens in a micro-batch, counted once per chosen expert; 0 in a dense model."""
    if not given.dimensions.experts:
        return 0.0
    tokens = given.geometry.rank_tokens / given.config.parallel.tensor * given.dimensions.experts_per_token
    return tokens * given.dimensions.hidden * given.element_bytes


def _dispatch_seconds(given: PlanInputs) -> float:
    """Return the seconds that sorting tokens and the all-to-all take in one pass over a micro-batch."""
    if not given.dimensions.experts:
        return 0.0
    expert = given.config.parallel.expert
    seconds = _most_layers(given) * PERMUTATIONS * _routed_bytes(given) / given.memory_bytes_per_s
    if expert > 1:
        # Expert-parallel ranks have consecutive numbers, so they share a node if a node has enough GPUs.
        seconds += _dispatch_bytes(given) / given.link_bytes_per_s(expert)
    return seconds * _expert_wait(given.config)


def _expert_wait(config: RunConfig) -> float:
    """Return the time of the busiest expert rank, divided by its time under an even load."""
    return EXPERT_CROWDING if config.parallel.expert > 1 else 1.0


def _pass_time(
    given: PlanInputs, *, layer_passes: int, weight_passes: int, output_passes: int, collectives: int
) -> PassTime:
    """Return the time of a step's micro-batches if their layers cost as much as `layer_passes` forward passes.

    The products with the model's weights, adapters excluded, cost as much as `weight_passes` forward passes.
    """
    parallel, workload, geometry = given.config.parallel, given.workload, given.geometry
    flops = forward_flops(given.dimensions, context=workload.tokens / 2, output_share=workload.output_share)
    by_stage = [
        _stage_operations(given, flops, stage, layer_passes=layer_passes, weight_passes=weight_passes)
        for stage in range(parallel.pipeline)
    ]
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
    # Neighbouring stages are far apart in rank order, so their link crosses nodes unless one node holds all ranks.
    one_boundary = directions * _boundary_bytes(given) / given.link_bytes_per_s(given.gpus)
    count, steps = geometry.microbatches, geometry.optimizer_steps
    # A stage with several chunks waits only until the previous stage has finished one chunk.
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
    given: PlanInputs, flops: TokenFlops, stage: int, *, layer_passes: int, weight_passes: int
) -> float:
    """Return a token's operations in `stage`, converted to bfloat16 operations that take the same time."""
    parallel, fp8, all_layers = given.config.parallel, given.config.model.fp8, given.dimensions.layers
    layers = parallel.stage_layers(all_layers)[stage]
    in_fp8 = layers - fp8.bf16_layers(stage, parallel.pipeline) if fp8.enabled else 0
    linear = flops.linear + flops.experts * _expert_wait(given.config)
    weights = (layers - in_fp8 + in_fp8 / given.assumed.fp8_speed) * linear
    others = layers * (flops.attention + adapter_flops(given.config, given.dimensions))
    return (weight_passes * weights + layer_passes * others) / all_layers
