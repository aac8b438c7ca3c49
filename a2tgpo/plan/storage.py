"""What a run reads and keeps on the file system that its nodes share."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.parameters import checkpoint_parameters

MODEL_FILE_BYTES = 2
"""Of a parameter in the files of `model.path`, which are taken to be in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Checkpoints on the disk."""

    whole: int
    weights_only: int


def most_kept(config: RunConfig) -> Kept:
    """What a run has on the disk at the most: a new checkpoint is whole before an older one is reduced or removed."""
    kept, last = config.checkpoint, config.run.steps
    every = [kept.every] if kept.every else []
    has_best = kept.best_by != "none"
    if has_best and config.evaluation.every:
        every.append(config.evaluation.every)
    saved = sorted({step for number in every for step in range(number, last + 1, number)} | {last})
    older = saved[: -kept.keep]
    lasting = sum(step % kept.keep_every == 0 for step in older) if kept.keep_every else 0
    return Kept(whole=min(kept.keep + 1, len(saved)), weights_only=lasting + (1 if has_best and older else 0))


def checkpoint_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Size of a checkpoint: weights, two moments in float32, and float32 weights beside those in bfloat16."""
    element = ELEMENT_BYTES[config.model.dtype]
    return checkpoint_parameters(dimensions) * (element + 8 + (4 if element < 4 else 0))


def weights_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Size of a checkpoint of which the weights alone are kept, and of a model that a warm start writes."""
    return checkpoint_parameters(dimensions) * ELEMENT_BYTES[config.model.dtype]


def kept_bytes(config: RunConfig, dimensions: ModelDimensions, kept: Kept) -> float:
    """Size of these checkpoints, within `checkpoint.keep_gb`, which never removes the best."""
    one = weights_bytes(config, dimensions)
    weights: float = kept.weights_only * one
    if config.checkpoint.keep_gb:
        weights = min(weights, max(config.checkpoint.keep_gb * 1e9, one))
    return kept.whole * checkpoint_bytes(config, dimensions) + weights


def restart_bytes(config: RunConfig, dimensions: ModelDimensions, *, gpus: int, gpus_per_node: int) -> int:
    """What a start from a checkpoint reads, over all ranks; a file counts once for each node that reads it.

    The checkpoint is read once by all ranks together. The files of `model.path` are read by each node for a
    reference model, and for each engine that quantises weights as it loads them.
    """
    model = checkpoint_parameters(dimensions) * MODEL_FILE_BYTES
    nodes = -(-gpus // gpus_per_node)
    readers = nodes * (config.algorithm.kl_coef > 0)
    if config.rollout.quantization != "none":
        readers += max(nodes, gpus // config.rollout.tensor_parallel)
    return checkpoint_bytes(config, dimensions) + readers * model
