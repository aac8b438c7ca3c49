"""Compute log-probs and entropy from vocabulary-parallel logits, without a float32 copy of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class TokenDistribution:
    """The next-token distribution whose log-probs and entropy a pass computes.

    The engine samples from softmax(logits / `rollout.temperature`) over the tokenizer's ids. If the training pass
    used another temperature, the gradient would be biased.
    """

    temperature: float = 1.0
    num_ids: int | None = None
    """Only the first `num_ids` ids of the vocabulary can be sampled. None: all ids can be sampled."""


MODEL_DISTRIBUTION = TokenDistribution()
"""The model's own distribution, with temperature 1 and the whole vocabulary."""


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(logits / temperature) of each target, and the entropy of each token's distribution.

    Every rank of `tp_group` must call this with the same targets. The softmax is over the first `vocab_size` entries
    of the vocabulary. Padding entries get no gradient. Only `chunk_size` tokens at a time are converted to float32
    (float64 for float64 logits). The only additional tensor as large as the logits is therefore the gradient of the
    logits.

    Args:
        logits: [n, padded vocabulary / tp]. Rank r of `tp_group` holds the r-th slice.
        targets: [n] int64 in [0, vocab_size).

    Returns:
        Log-probs [n] and entropies [n] in nats, float32 (float64 for float64 logits), equal on all ranks.
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, vocab_size, tp_group, temperature, chunk_size)
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        tp_group: ProcessGroup,
        temperature: float,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, width = logits.shape
        first = tp_group.rank() * width
        num_real = min(max(vocab_size - first, 0), width)
        local_targets = targets - first
        is_local = (local_targets >= 0) & (local_targets < num_real)
        local_targets = torch.where(is_local, local_targets, 0)

        dtype = torch.promote_types(logits.dtype, torch.float32)
        # For each token, over this rank's slice: the maximum, and in `sums` the sum of e = exp(x - maximum), the sum
        # of e * x, and x[target].
        maximum = logits.new_full((num_tokens,), torch.finfo(dtype).min, dtype=dtype)
        sums = logits.new_zeros((3, num_tokens), dtype=dtype)
        if num_real:
            for rows in _chunks(num_tokens, chunk_size):
                x = _scaled(logits[rows, :num_real], dtype, temperature)  # [chunk, num_real]
                maximum[rows] = x.amax(-1)
                sums[2, rows] = x.gather(-1, local_targets[rows, None])[:, 0] * is_local[rows]
                weights = (x - maximum[rows, None]).exp_()
                sums[0, rows] = weights.sum(-1)
                sums[1, rows] = weights.mul_(x).sum(-1)
        if tp_group.size() > 1:
            global_maximum = maximum.clone()
            dist.all_reduce(global_maximum, op=dist.ReduceOp.MAX, group=tp_group)
            sums[:2] *= (maximum - global_maximum).exp_()
            dist.all_reduce(sums, group=tp_group)
            maximum = global_maximum
        log_normalizer = maximum + sums[0].log()
        logprobs = sums[2] - log_normalizer
        entropy = log_normalizer - sums[1] / sums[0]

        ctx.save_for_backward(logits, local_targets, is_local, log_normalizer, entropy)
        ctx.num_real, ctx.temperature, ctx.chunk_size = num_real, temperature, chunk_size
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, local_targets, is_local, log_normalizer, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_normalizer)
        # Every rank has both outputs and their gradients for all tokens, so no communication is needed.
        grad_logits = torch.zeros_like(logits)
        for rows in _chunks(logits.size(0), ctx.chunk_size):
            if not ctx.num_real:
                break
            x = _scaled(logits[rows, : ctx.num_real], log_normalizer.dtype, ctx.temperature)
            log_probs = x.sub_(log_normalizer[rows, None])  # [chunk, num_real]
            # d logprob / dx_j = [j = target] - p_j, and d entropy / dx_j = -p_j (log p_j + entropy)
            weight = -grad_logprobs[rows, None]
            if grad_entropy is None:  # one buffer suffices
                grad = log_probs.exp_().mul_(weight)
            else:
                grad = log_probs.exp()
                grad.mul_(log_probs.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None]).add_(weight))
            at_target = (grad_logprobs[rows] * is_local[rows])[:, None]
            grad.scatter_add_(-1, local_targets[rows, None], at_target)
            grad_logits[rows, : ctx.num_real] = grad.div_(ctx.temperature)
        return grad_logits, None, None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scaled(logits: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """Return logits / temperature in `dtype`, always as a new tensor, because the caller modifies the result."""
    return logits.to(dtype, copy=True).div_(temperature)
