"""Take one optimizer step: compute gradients over all micro-batches, then update if loss and gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.memory.offload import gradient_tensors
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION, TokenDistribution
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_reduce_sum, from_last_stage
from a2tgpo.update.forward_step import run_pipeline

LossFunction = Callable[[int, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""A function (number of the micro-batch, logprobs [T] float32, entropy [T] float32) -> (loss, metrics).

Both tensors are 0 at masked positions. The objective is the sum of the scalar losses over all micro-batches and
data-parallel replicas. A metric may have any shape. Its values are summed over micro-batches.
"""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimizer step. All fields except `metrics` are equal on all ranks."""

    loss: float
    """Value of the objective before the update."""
    grad_norm: float
    """L2 norm of all gradients of the model before clipping."""
    update_ok: bool
    """Whether the update was made. The update is skipped if the loss or the gradients are not finite."""
    metrics: dict[str, Tensor]
    """Sums over the micro-batches of this data-parallel replica, on the CPU, equal on all ranks of the replica."""


def train_step(
    policy: Policy,
    optimizer: Any,
    microbatches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    distribution: TokenDistribution = MODEL_DISTRIBUTION,
) -> StepResult:
    """Take one optimizer step on the loss of `microbatches`.

    Every rank must call this, with the micro-batches that `run_pipeline` requires. `loss_function` is called only on
    the last pipeline stage, once per micro-batch, in order. If the loss or the gradients are not finite on any rank,
    weights and optimizer state stay unchanged on all ranks.
    """
    metrics = compute_gradients(policy, microbatches, loss_function, distribution=distribution)
    loss = float(metrics.pop(_LOSS))
    grad_norm, update_ok = _apply_gradients(optimizer, loss_is_finite=math.isfinite(loss))
    return StepResult(loss=loss, grad_norm=grad_norm, update_ok=update_ok, metrics=metrics)


_LOSS = "loss over all replicas"


def compute_gradients(
    policy: Policy,
    microbatches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    distribution: TokenDistribution = MODEL_DISTRIBUTION,
) -> dict[str, Tensor]:
    """Compute the gradients of the loss, reduce them over all ranks, and return the sums of the metrics.

    Every rank must call this. The gradients stay in the model's buffers. With the distributed optimizer, a rank's
    buffer holds the full sum only in the part that the rank updates.

    Raises:
        RuntimeError: if the weights or the gradients are not on the GPU.
    """
    if not all(tensor.untyped_storage().nbytes() for tensor in gradient_tensors(policy)):
        raise RuntimeError("the gradients are off the card; enter memory phase update first")
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    sums: dict[str, Tensor] = {}
    loss_sum = torch.zeros((), dtype=torch.float64, device=policy.groups.device)

    def add_up(number: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        loss, metrics = loss_function(number, logprobs, entropy)
        loss_sum.add_(loss.detach())
        for name, value in metrics.items():
            value = value.detach().double()
            sums[name] = sums[name] + value if name in sums else value
        return loss

    run_pipeline(policy, microbatches, add_up, distribution=distribution, forward_only=False)
    groups = policy.groups
    # The sum is 0 on all stages except the last, but every stage must take part in the reduction.
    sums[_LOSS] = all_reduce_sum(loss_sum, groups.dp_group)
    sums = {name: value.cpu() for name, value in sums.items()}
    sums = from_last_stage(sums, groups)
    return sums


@torch.no_grad()
def _apply_gradients(optimizer: Any, *, loss_is_finite: bool) -> tuple[float, bool]:
    """Clip gradients and update weights as Megatron's ChainedOptimizer.step does, but only if loss and norm are
    finite.

    Megatron checks for infinities only with loss scaling (fp16), so without this check a NaN would reach the weights.
    The norm is reduced over all ranks, so all ranks take the same branch.
    """
    found_inf = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    update_ok = loss_is_finite and not found_inf and math.isfinite(grad_norm)
    if update_ok:
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        update_ok = bool(optimizer.step_with_ready_grads())
    optimizer.zero_grad()
    return grad_norm, update_ok
