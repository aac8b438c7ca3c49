"""The model as this process holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import PretrainedConfig

from a2tgpo.batch.packing import Alignment
from a2tgpo.parallel.groups import ParallelGroups


@dataclass
class Policy:
    """One rank's part of a model: its pipeline stage's layers, its tensor-parallel slice of each."""

    chunks: list[nn.Module]
    """What the pipeline schedule runs: DistributedDataParallel(Float16Module(GPTModel)) when trainable in bfloat16;
    without DistributedDataParallel when not trainable, without Float16Module in float32. Of parallel.virtual chunks,
    the first holds the stage's earliest layers."""
    transformer_config: TransformerConfig
    hf_config: PretrainedConfig
    bridge: Any
    """mbridge's weight tables for this architecture; used by `weights` only."""
    groups: ParallelGroups
    path: str
    """Folder of the checkpoint it was built from."""
    dtype: torch.dtype
    """Of weights and activations."""
    vocab_size: int
    """Vocabulary of the checkpoint, padding not counted."""
    alignment: Alignment
    """What the lengths of packed batches must be multiples of."""
    trainable: bool

    @property
    def gpt_models(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [unwrapped(chunk) for chunk in self.chunks]

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return bool(self.hf_config.tie_word_embeddings)


def require_weights(policy: Policy) -> None:
    """Raise RuntimeError where the weights are off the card: reading them there ends the process without a word."""
    parameters = (parameter for chunk in policy.chunks for parameter in chunk.parameters())
    if any(p.numel() and not p.untyped_storage().nbytes() for p in parameters):
        raise RuntimeError(
            "the weights are off the card; enter a memory phase that has them (a2tgpo/residency.py)"
        )


def gather_weights(policy: Policy) -> None:
    """Have every rank hold what the last update made of the weights; every rank calls this before it reads them.

    Where the gather runs beside computation, a rank that has stepped waits for the next forward pass to bring it the
    parts that other ranks have stepped.

    Raises:
        RuntimeError: if the weights are off the card.
    """
    require_weights(policy)
    for chunk in policy.chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrapped(chunk: Any) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
