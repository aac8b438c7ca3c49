"""Run all micro-batches through the pipeline once, for scoring or for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from a2tgpo.model.policy import Policy, require_weights
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.parallel.groups import ParallelGroups

TokenFunction = Callable[[int, Tensor, Tensor], Tensor]
"""A function (number of the micro-batch, logprobs [T] float32, entropy [T] float32) -> scalar to differentiate.

Both tensors are 0 at positions where `loss_mask` is False, because the output layer does not run there.
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
    """Run the policy over `microbatches`. On the last stage, pass the log-probs of each one to `token_function`.

    Every rank must call this. Each data-parallel replica has its own micro-batches, which must be the same on
    all ranks of the replica. Replicas may have different numbers of micro-batches, even none. A replica with
    fewer micro-batches runs additional empty ones, so that all replicas reach every collective. Interleaved
    stages need whole rounds of micro-batches, so rounds are filled up with empty ones, too. `token_function`
    never sees an empty micro-batch. Context-parallel ranks each run a part of a micro-batch, but
    `token_function` sees the whole micro-batch on each of them.

    The gradients left in the model are those of the sum of `token_function`'s values over all micro-batches and
    all data-parallel replicas. Megatron averages over both; this function undoes the averaging.

    Args:
        distribution: the distribution of the log-probs and entropies that `token_function` receives.
        forward_only: whether to compute no gradients. If so, the values of `token_function` are ignored.

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
    # Megatron divides the loss by `count` and multiplies it by cp_size (schedules.py, forward_step_calc_loss), and
    # divides the gradients by dp_size * cp_size (distributed_data_parallel.py, gradient_scaling_factor).
    scale = 1.0 if forward_only else float(count * groups.dp_size)

    def finish(number: int, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = _logprobs(policy, logits, batches[number], scored[number], distribution)
        is_real = number < real_count
        loss = token_function(number, logprobs, entropy) if is_real else logprobs.new_zeros(())
        if not (forward_only or loss.requires_grad):
            loss = loss + 0.0 * logprobs.sum()  # backward must reach every stage and every parameter
        return loss * scale, {}

    def forward_step(numbers: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        batch = batches[number]
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
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=policy.chunks,
        num_microbatches=count,
        seq_length=max(batch.num_tokens for batch in batches),  # unused: stages send each other their shapes
        micro_batch_size=1,
        forward_only=forward_only,
    )


class _ScoredRows(NamedTuple):
    """How a micro-batch is divided over context-parallel ranks, and which of this rank's rows need log-probs."""

    positions: Tensor
    """[cp, T / cp] int64: for each context-parallel rank, the positions of the batch that the rank runs."""
    rows: Tensor
    """[n] int64, n >= 1: indices of those positions of this rank at which `loss_mask` is True.

    If there is no such position, the tensor is [0], so that the micro-batch still reaches every parameter and
    every collective.
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
    """Compute, from the logits of the scored rows, log p of the batch's targets and the entropies.

    Both are [T] tensors, and 0 at masked positions.
    """
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
        return values.where(batch.loss_mask[0], 0.0)  # if no row is needed, this also masks row [0]

    # Scatter the two separately. If they were stacked, autograd would run backward through entropies that no
    # loss uses.
    return over_the_row(found[0]), over_the_row(found[1])
