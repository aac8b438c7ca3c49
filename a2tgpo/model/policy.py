"""One rank's part of a model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import PretrainedConfig

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import Alignment
from a2tgpo.model.expert_load import ExpertLoad
from a2tgpo.model.lora import Adapters
from a2tgpo.model.router_balance import RouterBalance
from a2tgpo.model.router_replay import RouterReplay
from a2tgpo.parallel.groups import ParallelGroups


@dataclass
class Policy:
    """One rank's part of a model: its tensor-parallel slice of each layer of its pipeline stage."""

    chunks: list[nn.Module]
    """The modules that the pipeline schedule runs. The first chunk has the stage's earliest layers. A chunk is
    DistributedDataParallel(Float16Module(GPTModel)). An untrainable chunk has no DistributedDataParallel, and a chunk
    in float32 has no Float16Module."""
    transformer_config: TransformerConfig
    hf_config: PretrainedConfig
    bridge: Any
    """mbridge's weight tables for this architecture. Only the module `weights` uses them."""
    groups: ParallelGroups
    path: str
    """Folder of the checkpoint."""
    dtype: torch.dtype
    """Dtype of weights and activations."""
    vocab_size: int
    """Size of the checkpoint's vocabulary, without padding."""
    alignment: Alignment
    """Multiples to which packed batches are padded."""
    trainable: bool
    expert_load: ExpertLoad | None = None
    """Counts the tokens of each expert in training passes. None: the model has no experts or is not trainable."""
    adapters: Adapters | None = None
    """The low-rank adapters, if only these are trained."""
    is_base: bool = False
    """Whether passes and exports leave out the adapters (see `base`)."""
    router_replay: RouterReplay | None = None
    """Replays the engine's choice of experts. None: the routers always choose on their own."""
    router_balance: RouterBalance | None = None
    """Adds the balancing loss in training passes. None: there is no balancing loss."""

    @property
    def expert_shape(self) -> ExpertShape | None:
        """The shape of each token's row of expert ids, or None if the policy replays no experts."""
        return self.router_replay.shape if self.router_replay else None

    @property
    def gpt_models(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [unwrapped(chunk) for chunk in self.chunks]

    @property
    def wrapped_chunks(self) -> list[DistributedDataParallel]:
        """The chunks of a trainable policy, whose wrappers own the gradient buffers. Other policies have none."""
        return [chunk for chunk in self.chunks if isinstance(chunk, DistributedDataParallel)]

    @property
    def base(self) -> Policy:
        """The model without its adapters. It shares all weights with this policy, so it takes no memory."""
        assert self.adapters is not None, "only a policy with adapters has a base"
        return replace(
            self,
            is_base=True,
            trainable=False,
            expert_load=None,
            router_replay=None,
            router_balance=None,
        )

    def adapting(self) -> AbstractContextManager[None]:
        """Return a context in which the chunks use the adapters, or leave them out if `is_base` is True."""
        if self.adapters is None:
            return contextlib.nullcontext()
        return self.adapters.switched(on=not self.is_base)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return bool(self.hf_config.tie_word_embeddings)


def require_weights(policy: Policy) -> None:
    """Raise RuntimeError if the weights are not on the GPU, because reading them would crash the process silently."""
    parameters = (parameter for chunk in policy.chunks for parameter in chunk.parameters())
    if any(p.numel() and not p.untyped_storage().nbytes() for p in parameters):
        raise RuntimeError(
            "the weights are off the card; enter a memory phase that has them (a2tgpo/memory/residency.py)"
        )


def gather_weights(policy: Policy) -> None:
    """Finish the optimizer's parameter all-gather. Every rank must call this before it reads the weights.

    If the all-gather overlaps with computation, other ranks' updates may not have arrived before this call.

    Raises:
        RuntimeError: if the weights are not on the GPU.
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
