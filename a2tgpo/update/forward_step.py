"""Run all micro-batches through the pipeline once, for scoring or for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from a2tgpo.batch.context_split import context_positions
from a2tgpo.batch.packing import PackedBatch, empty_batch
from a2tgpo.model.context_gather import gather_context
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.logprobs import TokenDistribution, token_logprobs
from a2tgpo.model.policy import Policy, require_weights, unwrapped
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.parallel.groups import ParallelGroups

TokenFunction = Callable[[int, Tensor, Tensor], Tensor]
"""A function (number of the micro-batch, logprobs [T] float32, entropy [T] float32) -> scalar to differentiate.

Both tensors are 0 where `loss_mask` is False, because the output layer does not run there.
"""


def run_pipeline(
    policy: Policy,
    microbatches: Sequence[PackedBatch],
    token_function: TokenFunction,
    *,
    distribution: TokenDistribution,
    forward_only: bool,
) -> None:
    """Run the policy over `microbatches`. On the last stage, pass each micro-batch's log-probs to `token_function`.

    Every rank must call this. All ranks of a data-parallel replica must pass the same micro-batches. Replicas may
    have different numbers of micro-batches, even none. This function adds empty micro-batches, so that all replicas
    reach every collective. `token_function` never sees an empty micro-batch. On every context-parallel rank,
    `token_function` sees the whole micro-batch.

    If `forward_only` is False, the model afterwards holds the gradients of the objective. The objective is the sum of
    `token_function`'s values over all micro-batches and all data-parallel replicas.

    If the policy has a `router_replay`, its routers choose the experts of the micro-batches that have `experts`. If
    the policy has a `router_balance`, the gradients include those of the balancing loss.

    Args:
        distribution: the next-token distribution whose log-probs and entropies `token_function` receives.
        forward_only: compute no gradients, and ignore the values of `token_function`.

    Raises:
        RuntimeError: if the weights are not on the GPU.
    """
    require_weights(policy)
    groups = policy.groups
    real_count = len(microbatches)
    count = int(all_reduce_max(torch.tensor(max(real_count, 1)), groups.dp_group))
    if len(policy.chunks) > 1:
        count += -count % groups.pp_size
    filler = [empty_batch(policy.alignment)] * (count - real_count)
    batches = [batch.to(groups.device) for batch in (*microbatches, *filler)]
    scored = [_scored_rows(batch, groups) for batch in batches] if groups.is_pipeline_last else []
    # Megatron multiplies the loss by cp_size / count (schedules.py, forward_step_calc_loss), and divides the
    # gradients by dp_size * cp_size (distributed_data_parallel.py, gradient_scaling_factor). `scale` undoes both.
    scale = 1.0 if forward_only else float(count * groups.dp_size)

    def finish(number: int, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = _logprobs(policy, logits, batches[number], scored[number], distribution)
        is_real = number < real_count
        loss = token_function(number, logprobs, entropy) if is_real else logprobs.new_zeros(())
        if not (forward_only or loss.requires_grad):
            loss = loss + 0.0 * logprobs.sum()  # the backward pass must reach every stage and parameter
        return loss * scale, {}

    load, balance = (None, None) if forward_only else (policy.expert_load, policy.router_balance)
    replay = policy.router_replay
    if balance is not None:
        balance.begin(microbatches, scale=scale)

    def forward_step(numbers: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        batch = batches[number]
        with (
            nullcontext() if load is None else load.counting(batch),
            nullcontext() if balance is None else balance.balancing(unwrapped(chunk), batch),
            nullcontext() if replay is None else replay.replaying(unwrapped(chunk), batch),
        ):
            output = forward_packed(
                chunk,
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                tree=batch.tree,
                output_rows=scored[number].rows if groups.is_pipeline_last else None,
            )
        return output, partial(finish, number)

    iterators = [iter(range(count)) for _ in policy.chunks]
    with policy.adapting():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=policy.chunks,
            num_microbatches=count,
            seq_length=max(batch.num_tokens for batch in batches),  # unused, since stages exchange shapes
            micro_batch_size=1,
            forward_only=forward_only,
        )
    if replay is not None:
        replay.check_spent()
    if balance is not None:
        balance.check_spent()


class _ScoredRows(NamedTuple):
    """The division of a micro-batch over context-parallel ranks, and this rank's rows that need log-probs."""

    positions: Tensor
    """[cp, T / cp] int64: the positions of the batch that each context-parallel rank runs."""
    rows: Tensor
    """[n] int64, n >= 1: indices of this rank's positions at which `loss_mask` is True.

    If `loss_mask` is True nowhere, the only index is 0, so that the pass still uses every parameter and joins every
    collective.
    """


def _scored_rows(batch: PackedBatch, groups: ParallelGroups) -> _ScoredRows:
    if groups.cp_size > 1:
        positions = context_positions(batch.cu_seqlens, groups.cp_size).to(groups.device, non_blocking=True)
    else:
        positions = torch.arange(batch.num_tokens, device=batch.tokens.device)[None]
    rows = batch.loss_mask[0, positions[groups.cp_rank]].nonzero()[:, 0]
    return _ScoredRows(positions, rows if rows.numel() else rows.new_zeros(1))


def _logprobs(
    policy: Policy, logits: Tensor, batch: PackedBatch, scored: _ScoredRows, distribution: TokenDistribution
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the targets, and the entropies. Both are [T], and 0 at masked positions."""
    groups, own = policy.groups, scored.positions[policy.groups.cp_rank]
    targets = batch.targets[0, own[scored.rows]]
    found = token_logprobs(
        logits,
        targets,
        vocab_size=min(policy.vocab_size, distribution.num_ids or policy.vocab_size),
        tp_group=groups.tp_group,
        temperature=distribution.temperature,
    )

    def over_the_row(values: Tensor) -> Tensor:
        values = values.new_zeros(own.numel()).index_copy(0, scored.rows, values)
        if groups.cp_size > 1:
            values = gather_context(values, scored.positions, groups.cp_group)
        return values.where(batch.loss_mask[0], 0.0)  # this also masks index 0 if `loss_mask` is nowhere True

    # Scatter log-probs and entropies separately. If they were stacked, autograd would run backward through both.
    return over_the_row(found[0]), over_the_row(found[1])
