"""One pass of all micro-batches through the pipeline: what scoring and training have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from a2tgpo.batch.context_split import context_positions
from a2tgpo.batch.packing import PackedBatch, empty_batch
from a2tgpo.model.context_gather import gather_context
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.logprobs import token_logprobs
from a2tgpo.model.policy import Policy, require_weights
from a2tgpo.parallel.collectives import all_reduce_max

TokenFunction = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the micro-batch, logprobs [T] float32, entropy [T] float32) -> scalar to differentiate."""


def run_pipeline(
    policy: Policy, microbatches: Sequence[PackedBatch], token_function: TokenFunction, *, forward_only: bool
) -> None:
    """Run the policy over `microbatches` and hand each one's log-probs to `token_function` on the last stage.

    Every rank calls this, each data-parallel replica with its own micro-batches, the same on all of the
    replica's ranks. Replicas may hold different numbers of them, none included: those that have fewer run
    empty ones, which `token_function` never sees, so that all reach every collective. Interleaved stages take
    whole rounds of them, which empty ones fill up. Context-parallel ranks run a part of each micro-batch, but
    `token_function` sees all of it on each of them.

    The gradients left in the model are those of the sum, over micro-batches and data-parallel replicas, of what
    `token_function` returned: Megatron's averaging over both is undone here.

    Args:
        forward_only: no gradients; what `token_function` returns is then ignored.

    Raises:
        RuntimeError: if the weights are off the card.
    """
    require_weights(policy)
    groups = policy.groups
    real_count = len(microbatches)
    count = int(all_reduce_max(torch.tensor(max(real_count, 1)), groups.dp_group))
    if len(policy.chunks) > 1:
        count += -count % groups.pp_size
    filler = [empty_batch(policy.alignment)] * (count - real_count)
    batches = [batch.to(groups.device) for batch in (*microbatches, *filler)]
    # Megatron divides the loss by `count` and multiplies it by cp_size (schedules.py, forward_step_calc_loss), and
    # divides the gradients by dp_size * cp_size (distributed_data_parallel.py, gradient_scaling_factor).
    scale = 1.0 if forward_only else float(count * groups.dp_size)

    def finish(number: int, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = _logprobs(policy, logits, batches[number])
        is_real = number < real_count
        loss = token_function(number, logprobs, entropy) if is_real else logprobs.new_zeros(())
        if not (forward_only or loss.requires_grad):
            loss = loss + 0.0 * logprobs.sum()  # the backward pass must reach every stage and every parameter
        return loss * scale, {}

    def forward_step(numbers: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        batch = batches[number]
        output = forward_packed(chunk, batch.tokens, batch.positions, batch.cu_seqlens, tree=batch.tree)
        return output, partial(finish, number)

    iterators = [iter(range(count)) for _ in policy.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=policy.chunks,
        num_microbatches=count,
        seq_length=max(batch.num_tokens for batch in batches),  # unused: stages tell each other their shapes
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _logprobs(policy: Policy, logits: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """log p of all of the batch's targets and the entropies, [T] each, from this rank's logits."""
    groups, targets = policy.groups, batch.targets[0]
    at_targets = partial(token_logprobs, vocab_size=policy.vocab_size, tp_group=groups.tp_group)
    if groups.cp_size == 1:
        return at_targets(logits, targets)
    positions = context_positions(batch.cu_seqlens, groups.cp_size)
    own = torch.stack(at_targets(logits, targets[positions[groups.cp_rank]]))
    logprobs, entropy = gather_context(own, positions, groups.cp_group)
    return logprobs, entropy
