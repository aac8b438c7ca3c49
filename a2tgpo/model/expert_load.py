"""Count the tokens that each expert of a mixture gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from a2tgpo.batch.context_split import layer_positions
from a2tgpo.batch.packing import PADDING, PackedBatch
from a2tgpo.parallel.collectives import all_reduce_sum, world_group
from a2tgpo.parallel.groups import ParallelGroups


class ExpertLoad:
    """Counts this rank's tokens by layer and expert, without padding. Every rank of the model has an instance.

    Args:
        models: the chunks of this rank's pipeline stage, whose feed-forward layers are mixtures of experts.
        num_layers: number of layers in the whole model.
        sequence_parallel: whether tensor-parallel ranks divide the tokens.
    """

    def __init__(
        self, models: Sequence[Any], groups: ParallelGroups, *, num_layers: int, sequence_parallel: bool
    ) -> None:
        self._groups = groups
        self._sequence_parallel = sequence_parallel
        self._is_real: Tensor | None = None
        layers = [layer for model in models for layer in model.decoder.layers]
        num_experts = layers[0].mlp.router.num_experts
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=groups.device)
        for layer in layers:
            layer.mlp.router.register_forward_hook(partial(self._count, layer.layer_number - 1))

    @contextmanager
    def counting(self, batch: PackedBatch) -> Iterator[None]:
        """Count the tokens of each expert while the `with` block runs one model chunk on `batch`.

        A layer that is computed again in the backward pass is not counted again, because the backward pass runs
        outside the block.
        """
        own = layer_positions(batch.cu_seqlens, self._groups, sequence_parallel=self._sequence_parallel)
        self._is_real = batch.sequence_ids[0, own.to(batch.sequence_ids.device)] != PADDING
        try:
            yield
        finally:
            self._is_real = None

    def take(self) -> Tensor:
        """Return the counts since the last call by layer and expert, [num_layers, num_experts] float64 on the CPU.

        Every rank must call this. The counts are sums over all ranks. A token is counted once for each expert that it
        is routed to.
        """
        taken = all_reduce_sum(self._counts, world_group()).cpu()
        self._counts.zero_()
        return taken

    def _count(self, layer: int, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._is_real is not None:
            # Multiply by the mask, because indexing with the mask would make the host wait for the GPU.
            self._counts[layer] += (output[1] * self._is_real[:, None]).sum(0)
