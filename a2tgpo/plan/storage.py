"""Bytes that a run reads from, and keeps on, the file system shared by its nodes."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.parameters import checkpoint_parameters

MODEL_FILE_BYTES = 2
"""Bytes per parameter in the files of `model.path`, assumed to be in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Number of checkpoints on disk."""

    whole: int
    weights_only: int


def most_kept(config: RunConfig) -> Kept:
    """Return the largest number of checkpoints on disk: a new one is complete before an older one is reduced or
    removed.
    """
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
    """Return the size of a checkpoint: weights, two float32 moments, and float32 master weights if the weights are
    bfloat16.
    """
    element = ELEMENT_BYTES[config.model.dtype]
    return checkpoint_parameters(dimensions) * (element + 8 + (4 if element < 4 else 0))


def weights_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the size of a checkpoint reduced to its weights, and of a model that a warm start writes."""
    return checkpoint_parameters(dimensions) * ELEMENT_BYTES[config.model.dtype]


def kept_bytes(config: RunConfig, dimensions: ModelDimensions, kept: Kept) -> float:
    """Return the total size of these checkpoints, limited by `checkpoint.keep_gb`, which never removes the best."""
    one = weights_bytes(config, dimensions)
    weights: float = kept.weights_only * one
    if config.checkpoint.keep_gb:
        weights = min(weights, max(config.checkpoint.keep_gb * 1e9, one))
    return kept.whole * checkpoint_bytes(config, dimensions) + weights


def restart_bytes(config: RunConfig, dimensions: ModelDimensions, *, gpus: int, gpus_per_node: int) -> int:
    """Return the bytes that all ranks read in a start from a checkpoint; a file counts once per node that reads it.

    All ranks together read the checkpoint once. Each node reads the files of `model.path` if there is a reference
    model, and for each engine that quantises weights during loading.
    """
    model = checkpoint_parameters(dimensions) * MODEL_FILE_BYTES
    nodes = -(-gpus // gpus_per_node)
    readers = nodes * (config.algorithm.kl_coef > 0)
    if config.rollout.quantization != "none":
        readers += max(nodes, gpus // config.rollout.tensor_parallel)
    return checkpoint_bytes(config, dimensions) + readers * model
