"""Exact numbers of parameters on a rank. Tests in tests/unit/plan compare them with Megatron's model."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.plan.dimensions import ModelDimensions


@dataclass(frozen=True)
class Parameters:
    split: int
    """Parameters on one rank that are split over the tensor-parallel ranks."""
    replicated: int
    """Parameters of norms and routers, which every tensor-parallel rank holds in full."""
    experts: int = 0
    """Parameters of the experts on one rank. Each expert is whole on one expert-parallel rank."""

    @property
    def dense(self) -> int:
        return self.split + self.replicated

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.split + other.split, self.replicated + other.replicated, self.experts + other.experts
        )

    def __mul__(self, count: int) -> Parameters:
        return Parameters(self.split * count, self.replicated * count, self.experts * count)


def layer_parameters(dimensions: ModelDimensions, tensor: int, expert: int = 1) -> Parameters:
    """Return one layer's parameters on a rank, with `tensor` tensor-parallel and `expert` expert-parallel ranks."""
    d = dimensions
    qkv_width = d.query_width + 2 * d.kv_width
    split = d.hidden * qkv_width + d.query_width * d.hidden
    if d.has_qkv_biases:
        split += qkv_width
    replicated = 2 * d.hidden
    if d.has_qk_norms:
        replicated += 2 * d.head_dim
    feed_forward = 3 * d.hidden * d.ffn
    if d.experts:
        router = d.experts * d.hidden
        return Parameters(split // tensor, replicated + router, d.experts // expert * feed_forward)
    return Parameters((split + feed_forward) // tensor, replicated)


def linear_parameters(dimensions: ModelDimensions, tensor: int, expert: int = 1) -> int:
    """Return how many parameters of one layer on a rank can be in FP8: those of all matrices except the router's."""
    layer = layer_parameters(dimensions, tensor, expert)
    has_bias = dimensions.has_qkv_biases
    biases = (dimensions.query_width + 2 * dimensions.kv_width) // tensor if has_bias else 0
    return layer.split - biases + layer.experts


def stage_parameters(dimensions: ModelDimensions, parallel: ParallelConfig, stage: int) -> Parameters:
    """Return the parameters of all chunks on one rank of pipeline stage `stage`, counted from 0.

    If the embeddings are tied, both the first and the last stage hold them.
    """
    layers = parallel.stage_layers(dimensions.layers)[stage]
    held = layer_parameters(dimensions, parallel.tensor, parallel.expert) * layers
    embedding = dimensions.padded_vocab(parallel.tensor) // parallel.tensor * dimensions.hidden
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    if is_first:
        held += Parameters(embedding, 0)
    if is_last:
        held += Parameters(0, dimensions.hidden)  # the norm after the last layer
        if not (dimensions.tied and is_first):
            held += Parameters(embedding, 0)
    return held


def optimizer_parameters(parameters: Parameters, parallel: ParallelConfig, data_parallel: int) -> float:
    """Return how many of a rank's `parameters` have their optimizer state on this rank (distributed optimizer).

    A dense parameter is on all data-parallel and context-parallel ranks. An expert is on (tensor x context x
    data-parallel / expert-parallel) ranks.
    """
    replicas = parallel.context * data_parallel
    return parameters.dense / replicas + parameters.experts / (parallel.tensor * replicas / parallel.expert)


def checkpoint_parameters(dimensions: ModelDimensions) -> int:
    """Return the number of parameters in a checkpoint, without padding, and with tied embeddings only once."""
    d = dimensions
    return d.layers * layer_parameters(d, 1).total + d.hidden + (1 if d.tied else 2) * d.vocab * d.hidden


def largest_tensor(dimensions: ModelDimensions, tensor: int) -> int:
    """Return the number of elements of the largest full parameter, which the refit gathers at once."""
    return max(dimensions.padded_vocab(tensor) * dimensions.hidden, largest_layer_tensor(dimensions))


def largest_layer_tensor(dimensions: ModelDimensions) -> int:
    """Return the number of elements of the largest full parameter that belongs to a layer."""
    d = dimensions
    # The refit gathers experts one at a time from each expert-parallel rank.
    return max(2 * d.ffn * d.hidden, (d.query_width + 2 * d.kv_width) * d.hidden)
