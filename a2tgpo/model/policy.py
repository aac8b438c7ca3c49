"""This process's part of the model."""

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
    """One rank's part of a model: the layers of its pipeline stage, its tensor-parallel slice of each."""

    chunks: list[nn.Module]
    """The modules that the pipeline schedule runs: DistributedDataParallel(Float16Module(GPTModel)) when trainable in
    bfloat16; without DistributedDataParallel when not trainable, without Float16Module in float32. The first of the
    parallel.virtual chunks holds the stage's earliest layers."""
    transformer_config: TransformerConfig
    hf_config: PretrainedConfig
    bridge: Any
    """mbridge's weight tables for this architecture; only `weights` uses them."""
    groups: ParallelGroups
    path: str
    """Folder of the checkpoint."""
    dtype: torch.dtype
    """Dtype of weights and activations."""
    vocab_size: int
    """Vocabulary of the checkpoint, without padding."""
    alignment: Alignment
    """Multiples to which packed batches are padded."""
    trainable: bool

    @property
    def gpt_models(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [unwrapped(chunk) for chunk in self.chunks]

    @property
    def wrapped_chunks(self) -> list[DistributedDataParallel]:
        """The chunks of a trainable policy, whose wrappers own the gradient buffers; empty if not trainable."""
        return [chunk for chunk in self.chunks if isinstance(chunk, DistributedDataParallel)]

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return bool(self.hf_config.tie_word_embeddings)


def require_weights(policy: Policy) -> None:
    """Raise RuntimeError if the weights are off the GPU: reading them would crash the process without a message."""
    parameters = (parameter for chunk in policy.chunks for parameter in chunk.parameters())
    if any(p.numel() and not p.untyped_storage().nbytes() for p in parameters):
        raise RuntimeError(
            "the weights are off the card; enter a memory phase that has them (a2tgpo/memory/residency.py)"
        )


def gather_weights(policy: Policy) -> None:
    """Finish the optimizer's parameter all-gather; every rank must call this before it reads the weights.

    Where the all-gather overlaps with computation, the parts that other ranks updated otherwise arrive only with the
    next forward pass.

    Raises:
        RuntimeError: if the weights are off the GPU.
    """
    require_weights(policy)
    for chunk in policy.wrapped_chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrapped(chunk: Any) -> GPTModel:
    """Return the GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
