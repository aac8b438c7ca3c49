"""Predict the bytes that a run reads from the nodes' shared file system, and the bytes that it keeps there."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.adapters import all_adapters, saved_parameters
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.parameters import checkpoint_parameters

MODEL_FILE_BYTES = 2
"""Bytes per parameter in the files of `model.path`, which are assumed to be in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Numbers of checkpoints on disk: whole checkpoints, and checkpoints reduced to their weights."""

    whole: int
    weights_only: int


def most_kept(config: RunConfig) -> Kept:
    """Return the largest number of checkpoints that are on disk at the same time.

    A new checkpoint is complete before an older one is reduced or removed, so one more whole checkpoint is included.
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
    """Return the bytes of one checkpoint: weights, two float32 moments and, for bfloat16, float32 master weights."""
    state = 8 + (4 if ELEMENT_BYTES[config.model.dtype] < 4 else 0)
    return weights_bytes(config, dimensions) + saved_parameters(config, dimensions) * state


def weights_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the bytes of a checkpoint that was reduced to its weights. Adapters are in it twice, once for PEFT."""
    num_saved = saved_parameters(config, dimensions) + all_adapters(config, dimensions)
    return num_saved * ELEMENT_BYTES[config.model.dtype]


def model_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the bytes of the whole model, which a warm start writes."""
    return checkpoint_parameters(dimensions) * ELEMENT_BYTES[config.model.dtype]


def kept_bytes(config: RunConfig, dimensions: ModelDimensions, kept: Kept) -> float:
    """Return the bytes of the checkpoints in `kept`.

    `checkpoint.keep_gb` limits the bytes of reduced checkpoints, but one reduced checkpoint is always kept.
    """
    one = weights_bytes(config, dimensions)
    weights: float = kept.weights_only * one
    if config.checkpoint.keep_gb:
        weights = min(weights, max(config.checkpoint.keep_gb * 1e9, one))
    return kept.whole * checkpoint_bytes(config, dimensions) + weights


def restart_bytes(config: RunConfig, dimensions: ModelDimensions, *, gpus: int, gpus_per_node: int) -> int:
    """Return the bytes that all ranks together read when they start from a checkpoint.

    All ranks together read the checkpoint once. If there is a reference model, or if the checkpoint has only
    adapters, each node reads the files of `model.path` once. If engines quantise weights while loading, these files
    are also read once per engine, or once per node if there are more nodes than engines.
    """
    model = checkpoint_parameters(dimensions) * MODEL_FILE_BYTES
    nodes = -(-gpus // gpus_per_node)
    readers = nodes * (config.needs_reference or config.model.lora.enabled)
    if config.rollout.quantization != "none":
        readers += max(nodes, gpus // config.rollout.tensor_parallel)
    return checkpoint_bytes(config, dimensions) + readers * model
