"""Measure how fast the turn-level loss and its gradient are computed for 128 trajectories, compared with loops.

Each trajectory has 2,000 tokens. The loops implement Eq. 10-12 of the paper. One loop runs over trajectories and
turns with a mask for each turn, as in trainers with one padded row per trajectory. The other loop runs over single
tokens. This second loop gets only an eighth of the trajectories, because autograd keeps a graph node for every
operation. All variants give the same loss and gradient.
"""

from __future__ import annotations

import dataclasses
import functools

import measure
import torch
from torch import Tensor
from trajectories import make_trajectories

from a2tgpo.batch.packing import Alignment, pack
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss

COUNT, TOKENS = 128, 2000
PART = 16
CONFIG = AlgorithmConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of the loss in two forms: flat over the sampled tokens, and padded with a row per trajectory."""

    logprobs: Tensor
    """Log-probs [n] of the sampled tokens."""
    inputs: LossInputs
    padded_logprobs: Tensor
    """Log-probs [N, longest] of all tokens. The other padded tensors have the same shape."""
    padded_old: Tensor
    padded_turns: Tensor
    """The turn index of each sampled token, or -1 at all other positions."""
    turn_advantages: list[list[float]]
    turn_clip_scales: list[list[float]]

    @property
    def is_sampled(self) -> Tensor:
        return self.padded_turns >= 0


def make_case(count: int) -> Case:
    trajectories = make_trajectories(count, mean_tokens=TOKENS, spread=0.0)
    batch = pack(trajectories, range(count), align=Alignment())
    generator = torch.Generator().manual_seed(0)
    lengths = batch.cu_seqlens.diff().tolist()
    shape = (count, max(lengths))
    logprobs = -torch.rand(shape, generator=generator) * 3
    old = logprobs + 0.01 * torch.randn(shape, generator=generator)
    turns = torch.full(shape, -1)
    local_turns = torch.where(batch.loss_mask[0], batch.turn_index[batch.turn_ids[0]], -1)
    for row, part in enumerate(local_turns.split(lengths)):
        turns[row, : len(part)] = part
    is_sampled = turns >= 0
    advantages = torch.randn(batch.num_turns, generator=generator)
    scales = 1 + 0.3 * torch.rand(batch.num_turns, generator=generator)
    mask = batch.loss_mask[0]
    turn_ids, sequence_ids = batch.turn_ids[0, mask], batch.sequence_ids[0, mask]
    num_sampled = torch.tensor([t.num_sampled_tokens for t in trajectories])
    turns_of = [int((batch.turn_trajectory == row).sum()) for row in range(count)]
    return Case(
        logprobs=logprobs[is_sampled],
        inputs=LossInputs(
            old_logprobs=old[is_sampled],
            advantages=advantages[turn_ids],
            clip_scale=scales[turn_ids],
            weights=(1 / (count * num_sampled.double())).float()[sequence_ids],
            turn_ids=turn_ids,
            sequence_ids=sequence_ids,
            num_turns=batch.num_turns,
            num_sequences=count,
        ),
        padded_logprobs=logprobs,
        padded_old=old,
        padded_turns=turns,
        turn_advantages=[part.tolist() for part in advantages.split(turns_of)],
        turn_clip_scales=[part.tolist() for part in scales.split(turns_of)],
    )


def ours(case: Case) -> tuple[Tensor, Tensor]:
    """Return the project's loss, and its gradient with respect to the log-probs [n]."""
    logprobs = case.logprobs.clone().requires_grad_()
    result = policy_loss(logprobs, case.inputs, CONFIG)
    result.loss.backward()
    assert logprobs.grad is not None
    return result.loss.detach(), logprobs.grad


def loop_over_turns(case: Case) -> tuple[Tensor, Tensor]:
    logprobs = case.padded_logprobs.clone().requires_grad_()
    losses = []
    for row in range(len(logprobs)):
        log_ratio, turns = logprobs[row] - case.padded_old[row], case.padded_turns[row]
        token_losses = torch.zeros_like(log_ratio)
        for turn, advantage in enumerate(case.turn_advantages[row]):
            mask = (turns == turn).float()
            ratio = ((log_ratio * mask).sum() / mask.sum()).clamp(max=10.0).exp()
            token_losses = token_losses + mask * clipped(ratio, advantage, case.turn_clip_scales[row][turn])
        is_sampled = (turns >= 0).float()
        losses.append((token_losses * is_sampled).sum() / is_sampled.sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad[case.is_sampled]


def loop_over_tokens(case: Case) -> tuple[Tensor, Tensor]:
    logprobs = case.padded_logprobs.clone().requires_grad_()
    total = torch.zeros(())
    turns_of = case.padded_turns.tolist()
    for row in range(len(logprobs)):
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for position, turn in enumerate(turns_of[row]):
            if turn >= 0:
                log_ratio = logprobs[row, position] - case.padded_old[row, position]
                sums[turn] = sums[turn] + log_ratio if turn in sums else log_ratio
                counts[turn] = counts.get(turn, 0) + 1
        ratios = {turn: (sums[turn] / counts[turn]).clamp(max=10.0).exp() for turn in sums}
        num_sampled = sum(counts.values())
        for turn in turns_of[row]:
            if turn >= 0:
                advantage, scale = case.turn_advantages[row][turn], case.turn_clip_scales[row][turn]
                total = total + clipped(ratios[turn], advantage, scale) / (num_sampled * len(logprobs))
    total.backward()
    assert logprobs.grad is not None
    return total.detach(), logprobs.grad[case.is_sampled]


def clipped(ratio: Tensor, advantage: float, scale: float) -> Tensor:
    bounded = ratio.clamp(1 - scale * CONFIG.clip_low, 1 + scale * CONFIG.clip_high)
    return torch.maximum(-ratio * advantage, -bounded * advantage)


def rows() -> list[measure.Row]:
    whole, part = make_case(COUNT), make_case(PART)
    for case, loop in ((whole, loop_over_turns), (part, loop_over_tokens)):
        for found, expected in zip(ours(case), loop(case), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    turns = measure.interleaved(
        {"ours": lambda: ours(whole), "loop": lambda: loop_over_turns(whole)}, rounds=7
    )
    tokens = measure.interleaved(
        {"ours": lambda: ours(part), "loop": lambda: loop_over_tokens(part)}, rounds=3, warm_up=False
    )
    peaks = [measure.peak_megabytes(functools.partial(f, whole)) for f in (ours, loop_over_turns)]
    size = f"{COUNT} trajectories × {TOKENS:,} tokens"
    return [
        measure.compared(
            f"loss, forward and backward, {size}",
            turns["ours"],
            turns["loop"],
            baseline_is="loop over turns",
            unit="CPU s",
        ),
        measure.compared(
            f"loss, forward and backward, {PART} trajectories × {TOKENS:,} tokens",
            tokens["ours"],
            tokens["loop"],
            baseline_is="loop over tokens",
            unit="CPU s",
        ),
        measure.compared(
            f"peak memory of the loss, {size}", peaks[:1], peaks[1:], baseline_is="loop over turns", unit="MB"
        ),
    ]
