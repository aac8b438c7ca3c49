"""Predict the peak GPU memory in each phase, on the rank that needs the most memory in that phase.

The table in `memory/residency.py` says which parts are on the GPU in each phase.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.memory.residency import resident
from a2tgpo.plan.activations import FLOAT32_BYTES, MicrobatchShape
from a2tgpo.plan.adapters import stage_adapters, trained_parameters
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES, EngineMemory, engine_memory
from a2tgpo.plan.hardware import GIB, Gpu
from a2tgpo.plan.parameters import (
    largest_layer_tensor,
    largest_tensor,
    layer_parameters,
    optimizer_parameters,
    stage_parameters,
)
from a2tgpo.plan.precision import VALUE_BYTES, fp8_copy_bytes
from a2tgpo.plan.workload import Geometry

OF_ACTIVATIONS = ("activations", "backward workspace")
"""Names of the parts that are multiplied by `Assumptions.activation_ratio`."""
PHASES = ("start", "refit", "rollout", "score", "update")
"""Phases of `residency.PHASES` that need the most memory. Every other phase needs less memory than one of these."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    name: str
    stage: int
    """Pipeline stage of the rank that needs the most memory in this phase."""
    parts: dict[str, float]
    """Bytes of each part, by the part's name. The reserve is one of the parts."""
    capacity: float
    """Bytes of the GPU's memory."""

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def headroom(self) -> float:
        """Share of the GPU that the phase leaves free. The share is negative if the phase does not fit."""
        return 1 - self.peak / self.capacity

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


@dataclass(frozen=True, kw_only=True)
class TrainerMemory:
    """Bytes that each part of the trainer takes on one rank while the part is on the GPU."""

    weights: float
    gradients: float
    """Gradients are summed and reduced in float32."""
    master_weights: float
    """The optimizer's float32 copy of the weights. It is 0 if the weights themselves are float32."""
    moments: float
    """Adam's two float32 moments, which the first update creates."""
    fp8_copies: float
    """FP8 copies of the policy's and the reference's weights, which the first pass creates. 0 if FP8 is off."""
    reference: float
    """Weights of the reference model. 0 if the run needs none, or if the reference is the policy without adapters."""

    def parts(self, phase: str, *, offload: bool) -> dict[str, float]:
        """Return the bytes of each part that is on the GPU in `phase`, by the part's name in printed plans.

        Args:
            phase: one of `residency.PHASES`.
        """
        sizes = {
            "weights": ("trainer weights", self.weights),
            "gradients": ("gradients", self.gradients),
            "optimizer": ("optimizer", self.master_weights + (0.0 if phase == "start" else self.moments)),
            "reference": ("reference", self.reference),
        }
        held = resident(phase, offload=offload)
        parts = {name: size for part, (name, size) in sizes.items() if part in held}
        if phase != "start":  # the first pass creates the copies, and they stay in all later phases
            parts["FP8 copies of weights"] = self.fp8_copies
        return parts

    @property
    def before_update(self) -> float:
        """Bytes that an extrapolated update copies to host memory, and back.

        For each weight that the rank's optimizer updates, these are the weight, both moments, and the weight after
        the first probe step, in float32.
        """
        return 2 * self.moments

    @property
    def offloaded(self) -> float:
        """Bytes that offloading copies to host memory. Gradients are not copied, because they come back as zeros."""
        return self.weights + self.master_weights + self.moments + self.reference


def trainer_memory(
    config: RunConfig, dimensions: ModelDimensions, *, stage: int, data_parallel: int
) -> TrainerMemory:
    """Return the trainer's memory on a rank of pipeline stage `stage`."""
    held = stage_parameters(dimensions, config.parallel, stage)
    adapters = stage_adapters(config, dimensions, stage)
    trained = trained_parameters(config, dimensions, stage)
    shard = float(trained.total)
    if config.update.distributed_optimizer:
        shard = optimizer_parameters(trained, config.parallel, data_parallel)
    weights = (held.total + adapters.total) * ELEMENT_BYTES[config.model.dtype]
    has_reference = config.needs_reference and not config.model.lora.enabled
    copies = fp8_copy_bytes(config, dimensions, stage)
    return TrainerMemory(
        weights=weights,
        gradients=trained.total * FLOAT32_BYTES,
        master_weights=shard * FLOAT32_BYTES if config.model.dtype == "bfloat16" else 0,
        moments=2 * shard * FLOAT32_BYTES,
        fp8_copies=copies * (2 if config.needs_reference else 1),
        reference=weights if has_reference else 0,
    )


def memory_phases(
    config: RunConfig, dimensions: ModelDimensions, gpu: Gpu, geometry: Geometry, assumed: Assumptions
) -> list[Phase]:
    """Return the phases of a step in order. Each phase has the numbers of the rank with the highest peak."""
    engine = engine_memory(config, dimensions, gpu)
    by_stage = [
        _phases_of_stage(config, dimensions, gpu, geometry, engine, assumed, stage)
        for stage in range(config.parallel.pipeline)
    ]
    return [max(phases, key=lambda phase: phase.peak) for phases in zip(*by_stage, strict=True)]


def _phases_of_stage(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    geometry: Geometry,
    engine: EngineMemory,
    assumed: Assumptions,
    stage: int,
) -> list[Phase]:
    trainer = trainer_memory(config, dimensions, stage=stage, data_parallel=geometry.data_parallel)
    capacity, offload = gpu.memory_gib * GIB, config.update.offload
    # vLLM refuses to start unless its whole share of the GPU is free, even if the size of the cache is set.
    requested = max(engine.total, config.rollout.gpu_memory_fraction * capacity)
    engine_parts = {"engine weights": engine.weights, "KV cache": engine.kv_cache}
    working = {
        "start": {"engine's share": requested},
        "refit": {"refit buckets": _refit_bytes(config, dimensions)},
        "rollout": {"engine workspace": engine.workspace},
        "score": _score_parts(config, dimensions, stage),
        "update": _update_parts(config, dimensions, geometry, stage),
    }
    phases = []
    for name in PHASES:
        held = trainer.parts(name, offload=offload)
        if name != "start":  # in the start phase, the engine's requested share already includes these parts
            on_card = resident(name, offload=offload)
            held["engine graphs"] = engine.graphs
            held |= {part: size for part, size in engine_parts.items() if part in on_card}
        held |= {
            part: size * (assumed.activation_ratio if part in OF_ACTIVATIONS else 1.0)
            for part, size in working[name].items()
        }
        parts = {what: size for what, size in held.items() if size}
        parts["reserve"] = assumed.context_gib * GIB + assumed.fragmentation * sum(parts.values())
        phases.append(Phase(name=name, stage=stage, parts=parts, capacity=capacity))
    return phases


def _shape(config: RunConfig, dimensions: ModelDimensions) -> MicrobatchShape:
    # A trajectory that exceeds the micro-batch's token limit gets a micro-batch of its own.
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = max(config.update.max_microbatch_tokens, longest)
    return MicrobatchShape(
        dimensions=dimensions,
        parallel=config.parallel,
        tokens=-(-tokens // config.parallel.context),
        element_bytes=ELEMENT_BYTES[config.model.dtype],
        fp8_bytes=VALUE_BYTES[config.model.fp8.recipe] if config.model.fp8.enabled else 0.0,
        adapter_width=config.model.lora.rank
        * len(config.model.lora.targets_of(has_experts=bool(dimensions.experts))),
    )


def _score_parts(config: RunConfig, dimensions: ModelDimensions, stage: int) -> dict[str, float]:
    shape = _shape(config, dimensions)
    parts: dict[str, float] = {"activations": shape.forward_workspace_bytes()}
    if stage == config.parallel.pipeline - 1:
        parts["logits"] = shape.logit_bytes(with_gradient=False)
    return parts


def _update_parts(
    config: RunConfig, dimensions: ModelDimensions, geometry: Geometry, stage: int
) -> dict[str, float]:
    shape, recompute = _shape(config, dimensions), config.model.recompute
    layers = config.parallel.stage_layers(dimensions.layers)[stage] // config.parallel.virtual
    in_bf16 = min(layers, config.model.fp8.bf16_layers(stage, config.parallel.pipeline))
    chunk = (layers - in_bf16) * shape.saved_layer_bytes(recompute)
    chunk += in_bf16 * dataclasses.replace(shape, fp8_bytes=0.0).saved_layer_bytes(recompute)
    in_flight = chunks_in_flight(config.parallel, stage, geometry.microbatches)
    parts: dict[str, float] = {
        "activations": in_flight * chunk,
        "backward workspace": shape.backward_workspace_bytes(recompute),
    }
    if stage == config.parallel.pipeline - 1:
        parts["logits and gradient"] = shape.logit_bytes(with_gradient=True)
    return parts


def chunks_in_flight(parallel: ParallelConfig, stage: int, microbatches: int) -> int:
    """Return the number of forward passes, each over one chunk, that a stage makes before its first backward pass
    (1F1B).

    Each of these forward passes keeps the activations of the chunk's layers. The number for interleaved stages
    comes from megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches.
    """
    num_later = parallel.pipeline - stage - 1
    if parallel.virtual == 1:
        return min(microbatches, num_later + 1)
    rounds = -(-microbatches // parallel.pipeline)
    return min(
        rounds * parallel.pipeline * parallel.virtual,
        2 * num_later + (parallel.virtual - 1) * parallel.pipeline + 1,
    )


def _refit_bytes(config: RunConfig, dimensions: ModelDimensions) -> float:
    """Return a refit's peak bytes: the bucket being loaded, the next bucket, and tensors for merging shards.

    Adapters are merged in float32: the product B A exists twice while its projections are joined.
    """
    element_bytes, tensor = ELEMENT_BYTES[config.model.dtype], config.parallel.tensor
    largest = largest_tensor(dimensions, tensor) * element_bytes
    # If one bucket holds the largest parameter (embedding or head), the other holds layer parameters.
    in_layer, bucket = largest_layer_tensor(dimensions) * element_bytes, config.refit.bucket_mib * 2**20
    gathered: float = max(bucket, largest) + max(bucket, in_layer)
    if tensor > 1 and config.parallel.pipeline > 1:
        gathered += gathered / tensor  # the broadcast needs a buffer for its result
    copies = 1 if tensor > 1 else 0
    # The engine first collects all experts of a layer, and then copies its own part of each expert.
    layer = layer_parameters(dimensions, 1).experts * element_bytes
    collected = layer * (1 + 1 / config.rollout.tensor_parallel)
    merged = 0.0
    if config.model.lora.enabled:
        merged = 2 * FLOAT32_BYTES * largest_layer_tensor(dimensions) / tensor
    return gathered + copies * largest + collected + merged
