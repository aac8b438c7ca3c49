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
"""Number of float32 tensors [max_concurrent, vocabulary] in sampling: logits, log-probs, a sorted copy."""
GRAPH_GIB = 1.0
"""GiB of captured graphs and their buffers, which sleep does not free. With rollout.enforce_eager, they take 0."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes of each part of an engine on one rank."""

    weights: float
    workspace: float
    """Bytes for activations and sampling while the engine is awake."""
    graphs: float
    kv_cache: float
    """Bytes of the KV cache; negative if the engine's share of the GPU is too small for the other parts."""

    @property
    def total(self) -> float:
        return self.weights + self.workspace + self.graphs + self.kv_cache


def engine_dtype(config: RunConfig) -> str:
    return config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype


def engine_fault(config: RunConfig, dimensions: ModelDimensions, gpus: int) -> str | None:
    """Return one line that says why the engine's layout is impossible, or None if it is possible."""
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
    """Return the bytes of the engine's weights on one rank, with only the share `experts_share` of the experts."""
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
    """Return the bytes that one token's keys and values take on one rank, over all layers."""
    heads = max(1, dimensions.kv_heads // config.rollout.tensor_parallel)
    return 2 * dimensions.layers * heads * dimensions.head_dim * ELEMENT_BYTES[engine_dtype(config)]


def cache_gib_of_share(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> float:
    """Return the GiB that `rollout.gpu_memory_fraction` leaves for the KV cache, rounded down to half a GiB.

    A configuration should set `rollout.kv_cache_gib` to this value. Otherwise vLLM measures the remaining memory when
    the engine starts, and a later version of vLLM may silently leave less memory for the cache.
    """
    by_share = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, kv_cache_gib=0.0))
    return max(0.0, engine_memory(by_share, dimensions, gpu).kv_cache // (GIB / 2) / 2)


def engine_memory(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> EngineMemory:
    """Return the memory of an engine that is awake.

    If `rollout.kv_cache_gib` is 0, the KV cache gets the rest of the engine's share of the GPU.
    """
    rollout = config.rollout
    feed_forward = 3 * dimensions.ffn * dimensions.experts_per_token // rollout.tensor_parallel
    if dimensions.experts:
        feed_forward += (
            2 * dimensions.hidden * dimensions.experts_per_token
        )  # copies of the tokens that go to experts and come back
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
