"""Make the trainer's routers choose the experts that the engine chose.

Trainer and engine use different kernels and batches, so their hidden states differ by rounding errors. If two experts
have nearly equal logits for a token, the two routers may choose different experts. Trainer and engine then compute
different log-probs for this token and for all later tokens. With replay, a router of the trainer takes the engine's
experts, and computes their weights from its own logits. The router still gets its gradient, because the choice of
experts has no gradient in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from a2tgpo.batch.context_split import layer_positions
from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import PackedBatch
from a2tgpo.model.pass_value import PassValue, check_spent
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.parallel.groups import ParallelGroups


class RouterReplay:
    """Replays the experts of packed batches in one policy. Every rank of the policy has an instance.

    Megatron's own class (megatron/core/transformer/moe/router_replay.py) keeps one global list of all routers of the
    process, including those of a reference model. Its caller must announce each forward and backward pass of each
    micro-batch, but Megatron's pipeline schedules offer no place to do so. Megatron calls any object in the attribute
    `router.router_replay`, so each router gets an object of this module.

    Args:
        models: the chunks of this rank's pipeline stage, whose feed-forward layers are mixtures of experts.
        sequence_parallel: whether tensor-parallel ranks divide the tokens.
        recomputes: whether the backward pass computes every layer again.
    """

    def __init__(
        self,
        models: Sequence[Any],
        groups: ParallelGroups,
        *,
        shape: ExpertShape,
        sequence_parallel: bool,
        recomputes: bool,
    ) -> None:
        self.shape = shape
        self._groups = groups
        self._sequence_parallel = sequence_parallel
        self._recomputes = recomputes
        self._differs: Tensor | None = None
        self._choices = [_Choice(layer) for model in models for layer in model.decoder.layers]

    @contextmanager
    def replaying(self, model: Any, batch: PackedBatch) -> Iterator[None]:
        """Replay `batch.experts` while the `with` block runs `model`, one of the chunks, on `batch`.

        A layer that the backward pass computes again after the block replays the same experts.
        """
        choices: list[_Choice] = [layer.mlp.router.router_replay for layer in model.decoder.layers]
        own = layer_positions(batch.cu_seqlens, self._groups, sequence_parallel=self._sequence_parallel)
        rows: list[Tensor | None] = [None] * len(choices)
        if batch.experts is not None:
            layers = torch.tensor([choice.layer for choice in choices])
            # Select in host memory, so that only the rows of this rank's positions and layers move to the device.
            rows = list(batch.experts[own, layers[:, None]].to(self._groups.device))
        for choice, own_rows in zip(choices, rows, strict=True):
            choice.begin(
                own_rows, keeps=self._recomputes and model.training, compares=self._differs is not None
            )
        try:
            yield
        finally:
            for choice in choices:
                if self._differs is not None and choice.differs is not None:
                    self._differs[choice.layer, own.to(self._differs.device)] = choice.differs
                choice.end()

    @contextmanager
    def comparing(self, num_tokens: int) -> Iterator[Tensor]:
        """In the `with` block, let the routers choose on their own, and compare their choices with `batch.experts`.

        Every rank must enter the block. In it, a rank may run one batch of `num_tokens` positions, without gradients.

        Yields:
            [layers, num_tokens] uint8 on the policy's device. After the block, an entry is 1 where the router and
            the engine chose different experts. It is 0 where they agree, and where the batch has no row of experts.
            The tensor is equal on all ranks of the data-parallel replica.
        """
        groups = self._groups
        differs = torch.zeros(self.shape.layers, num_tokens, dtype=torch.uint8, device=groups.device)
        self._differs = differs
        try:
            yield differs
        finally:
            self._differs = None
        for group in (groups.tp_group, groups.cp_group, groups.pp_group):
            differs.copy_(all_reduce_max(differs, group))

    def check_spent(self) -> None:
        """Raise RuntimeError if the backward pass computed a layer fewer times than the forward pass did."""
        check_spent({choice.layer: choice.rows for choice in self._choices}, what="router replay")


class _Choice:
    """Replaces Megatron's RouterReplay object in one router."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer.layer_number - 1
        self.rows: PassValue[Tensor] = PassValue()
        """[n, chosen] ids for the tokens of the micro-batch. None: the router chooses."""
        self.differs: Tensor | None = None
        """[n] uint8, whether the router's own choice differs from `rows`, if the pass compares."""
        self._compares = False
        layer.mlp.router.router_replay = self

    def begin(self, rows: Tensor | None, *, keeps: bool, compares: bool) -> None:
        self.rows.begin(rows, keeps=keeps)
        self._compares = compares

    def end(self) -> None:
        self.rows.end()
        self.differs = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores and the ids of the experts to use, both [n, topk]. Megatron calls this in its routers.

        Args:
            scores: [n, experts], the router's scores for its tokens.
            default_compute_topk: the function that makes Megatron's own choice, with the same arguments.
        """
        assert default_compute_topk is not None
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        rows = self.rows.take()
        if rows is None:
            return own_scores, own
        rows = rows.long()
        has_row = (rows < scores.size(1)).all(1, keepdim=True)
        if self._compares:
            is_same = (own[:, :, None] == rows[:, None, :]).any(2).all(1)
            self.differs = (has_row[:, 0] & ~is_same).to(torch.uint8)
            return own_scores, own
        ids = torch.where(has_row, rows, own)
        return scores.gather(1, ids), ids
