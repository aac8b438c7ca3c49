"""Seconds that scoring and the update take: computation, pipeline bubble, communication."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import FLOAT32_BYTES
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.flops import forward_flops
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.parameters import stage_parameters
from a2tgpo.plan.workload import Geometry, Workload

OPTIMIZER_BYTES = 30
"""Read and written per parameter of the optimizer's shard in one step: gradient, master weight and two moments, twice
each but the gradient, and the new weight."""


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
    data: float = 0.0
    """Gradients reduced and weights gathered over the data-parallel ranks, not overlapped."""
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + self.tensor + self.pipeline + self.data + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes that one rank sends in one step's update."""

    tensor: float
    pipeline: float
    data: float


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
    fullest = stage_parameters(dimensions, config.parallel, 0).total
    shard = fullest / (geometry.data_parallel if config.update.distributed_optimizer else 1)
    optimizer = shard * OPTIMIZER_BYTES / (1e12 * gpu.memory_tb_per_s * assumed.memory_utilisation)
    span = config.parallel.tensor * geometry.data_parallel
    rate = gpu.link_bytes_per_s(span) * assumed.link_utilisation
    return PassTime(
        compute=passes.compute,
        bubble=passes.bubble,
        tensor=passes.tensor,
        pipeline=passes.pipeline,
        data=update_volume(config, dimensions, geometry).data / rate,
        optimizer=optimizer * geometry.optimizer_steps,
    )


def update_volume(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> Volume:
    """What one rank of the first stage sends in one step's update."""
    recomputes = config.model.recompute == "full"
    collectives = 4 + (2 if recomputes else 0) + (1 if config.parallel.sequence else 0)
    count = geometry.microbatches * geometry.optimizer_steps
    parameters = stage_parameters(dimensions, config.parallel, 0).total
    share = 1 - 1 / geometry.data_parallel
    gradient_and_weight = FLOAT32_BYTES + ELEMENT_BYTES[config.model.dtype]
    if not config.update.distributed_optimizer:
        gradient_and_weight = 2 * FLOAT32_BYTES  # an all-reduce of gradients
    return Volume(
        tensor=count * collectives * _tensor_bytes(config, dimensions, geometry),
        pipeline=count * 2 * _boundary_bytes(config, dimensions, geometry),
        data=geometry.optimizer_steps * parameters * gradient_and_weight * share,
    )


def _tensor_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Sent by a rank in one all-reduce (or reduce-scatter and all-gather) per layer of its stage."""
    layers = dimensions.layers // config.parallel.pipeline
    hidden_states = geometry.microbatch_tokens * dimensions.hidden * ELEMENT_BYTES[config.model.dtype]
    return layers * 2 * (1 - 1 / config.parallel.tensor) * hidden_states


def _boundary_bytes(config: RunConfig, dimensions: ModelDimensions, geometry: Geometry) -> float:
    """Hidden states of one micro-batch, sent by a rank to the next stage."""
    if config.parallel.pipeline == 1:
        return 0.0
    cut = config.parallel.tensor if config.parallel.sequence else 1
    return geometry.microbatch_tokens * dimensions.hidden * ELEMENT_BYTES[config.model.dtype] / cut


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
    flops = forward_flops(dimensions, context=workload.tokens / 2)
    # The last stage is the slowest: it has the output layer too.
    slowest = layer_passes * flops.layers / parallel.pipeline + output_passes * flops.output
    rate = gpu.peak_flops(config.model.dtype) * assumed.compute_utilisation * parallel.tensor
    one_compute = geometry.microbatch_tokens * slowest / rate * (1 + assumed.imbalance)
    one_tensor = 0.0
    if parallel.tensor > 1:
        link = gpu.link_bytes_per_s(parallel.tensor) * assumed.link_utilisation
        one_tensor = collectives * _tensor_bytes(config, dimensions, geometry) / link
    # Stages are furthest apart in the order of ranks: a boundary lies between nodes unless one node holds all.
    world = parallel.tensor * parallel.pipeline * geometry.data_parallel
    boundary_link = gpu.link_bytes_per_s(world) * assumed.link_utilisation
    directions = 2 if layer_passes > 1 else 1
    one_boundary = directions * _boundary_bytes(config, dimensions, geometry) / boundary_link
    count, steps = geometry.microbatches, geometry.optimizer_steps
    return PassTime(
        compute=steps * count * one_compute,
        bubble=steps * (parallel.pipeline - 1) * (one_compute + one_tensor + one_boundary),
        tensor=steps * count * one_tensor,
        pipeline=steps * count * one_boundary,
    )
