"""Add a balancing loss to the gradients of the routers.

For one layer and one trajectory i with T_i positions, let f_e be the share of the router's choices that fall on
expert e, and P_e the mean probability that the router gives to expert e. With E experts, the loss of a layer is

    B = 1/N sum_i E sum_e f_e P_e

over the N trajectories of a mini-batch. B is 1 if all experts are used evenly. The objective gets `coef` times the
sum of B over the layers. The choice of experts has no gradient, so the gradient comes from P.

Megatron calls this loss `seq_aux_loss`. But Megatron treats a whole packed row, with its padding, as one sequence,
and averages the loss over the micro-batches of a rank, so the gradient of Megatron's loss depends on the layout. Here
f and P belong to a trajectory, which is always in one row. So the gradient is the same, no matter how trajectories
are packed and divided over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.distributed import ProcessGroup

from a2tgpo.batch.context_split import layer_positions
from a2tgpo.batch.packing import PackedBatch
from a2tgpo.model.pass_value import PassValue, check_spent
from a2tgpo.parallel.collectives import all_reduce_sum, world_group
from a2tgpo.parallel.groups import ParallelGroups


class RouterBalance:
    """Adds the balancing loss in the training passes of one policy. Every rank of the policy has an instance.

    Args:
        models: the chunks of this rank's pipeline stage, whose feed-forward layers are mixtures of experts.
        coef: weight of the loss of each layer.
        num_layers: number of layers in the whole model.
        sequence_parallel: whether tensor-parallel ranks divide the tokens.
        recomputes: whether the backward pass computes every layer again.
    """

    def __init__(
        self,
        models: Sequence[Any],
        groups: ParallelGroups,
        *,
        coef: float,
        num_layers: int,
        sequence_parallel: bool,
        recomputes: bool,
    ) -> None:
        self._groups = groups
        self._coef = coef
        self._num_layers = num_layers
        self._sequence_parallel = sequence_parallel
        self._recomputes = recomputes
        self._weight, self._scale = 0.0, 1.0
        self._sum = torch.zeros((), dtype=torch.float64, device=groups.device)
        self._num_passes = 0
        self._memberships: dict[int, PassValue[Tensor]] = {}
        """For each layer, a float32 matrix [S, n] for the S trajectories of the micro-batch and this rank's n
        positions: 1 / T_i if the position belongs to trajectory i, else 0."""
        for model in models:
            for layer in model.decoder.layers:
                self._memberships[layer.layer_number] = PassValue()
                layer.mlp.router.register_forward_hook(partial(self._add_loss, layer.layer_number))

    def begin(self, microbatches: Sequence[PackedBatch], *, scale: float) -> None:
        """Begin the passes over a mini-batch. Every rank must call this.

        Args:
            microbatches: the micro-batches of this rank's data-parallel replica.
            scale: the factor by which the caller multiplies the policy's loss to undo Megatron's averages.
        """
        own = torch.tensor(float(sum(batch.num_sequences for batch in microbatches)))
        num_trajectories = float(all_reduce_sum(own, self._groups.dp_group))
        self._weight, self._scale = 1.0 / max(num_trajectories, 1.0), scale
        self._num_passes += 1

    @contextmanager
    def balancing(self, model: Any, batch: PackedBatch) -> Iterator[None]:
        """Add the loss while the `with` block runs `model`, one of the chunks, on `batch`.

        If the backward pass computes the layers again, the loss is added there, because only then it has a gradient.
        """
        own = layer_positions(batch.cu_seqlens, self._groups, sequence_parallel=self._sequence_parallel)
        numbers = torch.arange(batch.num_sequences, device=batch.sequence_ids.device)[:, None]
        in_row = batch.sequence_ids == numbers  # [S, T]
        membership = in_row[:, own.to(in_row.device)].float() / in_row.sum(1, keepdim=True)
        values = [self._memberships[layer.layer_number] for layer in model.decoder.layers]
        for value in values:
            value.begin(membership, keeps=self._recomputes)
        try:
            yield
        finally:
            for value in values:
                value.end()

    def check_spent(self) -> None:
        """Raise RuntimeError if the backward pass computed a layer fewer times than the forward pass did."""
        check_spent(self._memberships, what="balancing loss")

    def take(self) -> tuple[float, int]:
        """Return the sum of B over layers and passes since the last call, and the number of terms in this sum.

        Every rank must call this. The result is equal on all ranks.
        """
        total = float(all_reduce_sum(self._sum, world_group()))
        count = self._num_passes * self._num_layers
        self._sum.zero_()
        self._num_passes = 0
        return total, count

    def _add_loss(
        self, number: int, router: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Attach the loss of layer `number` to the router's output, so that the backward pass reaches it."""
        membership = self._memberships[number].take()
        if membership is None or not membership.numel() or not torch.is_grad_enabled():
            return None
        weights, chosen = output
        # The router's output has only the weights of the chosen experts, so compute the logits of all experts again.
        probs = router.gating(inputs[0]).flatten(0, -2).softmax(-1, dtype=torch.float32)
        loss = balancing_loss(membership, probs, chosen, top_k=router.topk, group=router.tp_cp_group)
        loss = loss * self._weight
        self._sum += loss.detach()
        # Megatron multiplies the gradient of this loss by the same factor as the policy's loss.
        return MoEAuxLossAutoScaler.apply(weights, loss * (self._coef * self._scale)), chosen


def balancing_loss(
    membership: Tensor, probs: Tensor, chosen: Tensor, *, top_k: int, group: ProcessGroup
) -> Tensor:
    """Return this rank's share of sum_i E sum_e f_e P_e, a scalar. Every rank of `group` must call this.

    The sum of the shares over `group` is the whole loss of the micro-batch. The gradient of a share is that of the
    whole loss for this rank's tokens.

    Args:
        membership: [S, n], 1 / T_i if this rank's position belongs to trajectory i, else 0.
        probs: [n, E], the router's probabilities.
        chosen: [n, E] bool, whether the token goes to the expert. Each token goes to `top_k` experts.
        group: the ranks that divide the positions of the row.
    """
    shares = all_reduce_sum(membership @ chosen.to(membership.dtype), group) / top_k
    return probs.size(1) * (shares * (membership @ probs)).sum()
