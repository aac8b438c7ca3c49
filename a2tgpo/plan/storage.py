"""What a run reads and keeps on the file system that its nodes share."""

from __future__ import annotations

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.parameters import checkpoint_parameters

MODEL_FILE_BYTES = 2
"""Of a parameter in the files of `model.path`, which are taken to be in bfloat16."""


def checkpoint_bytes(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Size of a checkpoint: weights, two moments in float32, and float32 weights beside those in bfloat16."""
    element = ELEMENT_BYTES[config.model.dtype]
    return checkpoint_parameters(dimensions) * (element + 8 + (4 if element < 4 else 0))


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
