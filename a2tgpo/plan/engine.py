"""GPU memory of one rank's part of a vLLM engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from a2tgpo.config.rollout import GPU_STEP_TOKENS
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import FLOAT32_BYTES
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.hardware import GIB, Gpu
from a2tgpo.plan.parameters import layer_parameters, linear_parameters
from a2tgpo.plan.precision import ENGINE_WEIGHT_BYTES

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}

SAMPLER_COPIES = 3
"""Number of float32 tensors [max_concurrent, vocabulary] during sampling: logits, log-probs, a sorted copy."""
GRAPH_GIB = 1.0
"""Memory of captured graphs and their buffers, which sleep does not free; 0 with rollout.enforce_eager."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes of an engine's parts on one rank."""

    weights: float
    workspace: float
    """Memory for activations and sampling while the engine is awake."""
    graphs: float
    kv_cache: float
    """Negative if the engine's share of the GPU does not even hold its weights."""

    @property
    def total(self) -> float:
        return self.weights + self.workspace + self.graphs + self.kv_cache


def engine_dtype(config: RunConfig) -> str:
    return config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype


def engine_fault(config: RunConfig, dimensions: ModelDimensions, gpus: int) -> str | None:
    """Return a line on why the engine's layout is impossible; None if it is possible."""
    tensor = config.rollout.tensor_parallel
    kv_divides = dimensions.kv_heads % tensor == 0 or tensor % dimensions.kv_heads == 0
    if dimensions.heads % tensor or not kv_divides:
        return (
            f"rollout.tensor_parallel is {tensor}; allowed: a divisor of the model's {dimensions.heads} attention "
            f"heads, and a divisor or a multiple of its {dimensions.kv_heads} key-value heads"
        )
    if gpus % tensor:
        return f"rollout.tensor_parallel is {tensor}; allowed: a divisor of the {gpus} GPUs"
    return None


def engine_weight_bytes(
    config: RunConfig, dimensions: ModelDimensions, *, experts_share: float = 1.0
) -> float:
    """Return the bytes of weights on one rank, counting the given share of the experts."""
    tensor = config.rollout.tensor_parallel
    embeddings = (1 if dimensions.tied else 2) * dimensions.padded_vocab(tensor) // tensor * dimensions.hidden
    layer = layer_parameters(dimensions, tensor)
    linear = linear_parameters(dimensions, tensor) - layer.experts
    others = layer.dense - linear
    linear_held = (
        linear + experts_share * layer.experts / tensor
    )  # unlike the trainer, the engine splits experts
    element_bytes: float = ELEMENT_BYTES[engine_dtype(config)]
    linear_bytes = element_bytes if config.rollout.quantization == "none" else ENGINE_WEIGHT_BYTES
    return (
        dimensions.layers * (linear_held * linear_bytes + others * element_bytes) + embeddings * element_bytes
    )


def kv_bytes_per_token(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the bytes of one token's keys and values in all layers, on one rank."""
    heads = max(1, dimensions.kv_heads // config.rollout.tensor_parallel)
    return 2 * dimensions.layers * heads * dimensions.head_dim * ELEMENT_BYTES[engine_dtype(config)]


def cache_gib_of_share(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> float:
    """Return the cache that `rollout.gpu_memory_fraction` leaves in this plan, rounded down to half a GiB, at least
    0.

    Setting `rollout.kv_cache_gib` to this value fixes the cache's size. Otherwise vLLM sizes the cache by a
    measurement at the start, and a version with a larger overhead would silently hold fewer trajectories.
    """
    by_share = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, kv_cache_gib=0.0))
    return max(0.0, engine_memory(by_share, dimensions, gpu).kv_cache // (GIB / 2) / 2)


def engine_memory(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> EngineMemory:
    """Return the memory of an awake engine; its cache is `rollout.kv_cache_gib`, or the rest of its share of the
    GPU.
    """
    rollout = config.rollout
    feed_forward = 3 * dimensions.ffn * dimensions.experts_per_token // rollout.tensor_parallel
    if dimensions.experts:
        feed_forward += (
            2 * dimensions.hidden * dimensions.experts_per_token
        )  # copies sent to experts and back
    width = (2 * dimensions.hidden + feed_forward) * GPU_STEP_TOKENS
    workspace = (
        width * ELEMENT_BYTES[engine_dtype(config)]
        + SAMPLER_COPIES * rollout.max_concurrent * dimensions.vocab * FLOAT32_BYTES
    )
    weights = engine_weight_bytes(config, dimensions)
    graphs = 0.0 if rollout.enforce_eager else GRAPH_GIB * GIB
    if rollout.kv_cache_gib:
        kv_cache = rollout.kv_cache_gib * GIB
    else:
        kv_cache = rollout.gpu_memory_fraction * gpu.memory_gib * GIB - weights - workspace - graphs
    return EngineMemory(weights=weights, workspace=workspace, graphs=graphs, kv_cache=kv_cache)
