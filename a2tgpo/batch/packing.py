"""Trajectories laid end to end in one row of tokens, every field aligned on the predicting position.

A trajectory with tokens x_0 .. x_{n-1} becomes the inputs x_0 .. x_{m-1} and the targets x_1 .. x_m, where x_m is the
last token that the policy sampled. No later token is predicted, so the model does not run a final observation. At
position k the model has read `tokens[k]`, and `logprobs[k]` is log p(`targets[k]`). So `loss_mask`, `turn_ids` and
`rollout_logprobs` refer to `targets[k]`, not to `tokens[k]`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.trajectory import Trajectory

PADDING = -1
"""`sequence_ids` of positions that belong to no trajectory."""
NOT_SAMPLED = -1
"""The turn of tokens that the policy did not sample."""


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """Positions [start, end) of a row: each attends to the node's prefix, and causally within the node.

    A trunk has an empty prefix; the prefix of a branch is the beginning of a trunk.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S trajectories in one row of T positions, U turns.

    Padding of a segment is at its end, where no other position attends to it; padding of the row forms a last
    segment. All padding is masked in every field.
    """

    tokens: Tensor
    """[1, T] int64, the model's input."""
    positions: Tensor
    """[1, T] int64, 0 at the start of every segment."""
    cu_seqlens: Tensor
    """[segments + 1] int32, the segments' boundaries; the last entry is T. Stays in host memory, see `to`."""
    targets: Tensor
    """[1, T] int64, the next token; 0 on padding."""
    loss_mask: Tensor
    """[1, T] bool, True where the target's log-prob is needed: where the policy sampled the target."""
    turn_ids: Tensor
    """[1, T] int64 in [0, U), the target's turn; 0 where masked."""
    sequence_ids: Tensor
    """[1, T] int64 in [0, S), index of the trajectory within this micro-batch; PADDING at padded positions."""
    rollout_logprobs: Tensor
    """[1, T] float32, the engine's log p of the target, nats; 0 where masked."""
    trajectory_indices: tuple[int, ...]
    """[S], the trajectories' indices in the list from which they were packed."""
    turn_trajectory: Tensor
    """[U] int64, the turn's trajectory as an index into the same list."""
    turn_index: Tensor
    """[U] int64, 0-based place of the turn in its trajectory."""
    tree: tuple[TreeNode, ...] | None = None
    """The attention pattern if it is not causal within each segment; see `probes`."""

    @property
    def num_tokens(self) -> int:
        """T, including padding."""
        return self.tokens.size(1)

    @property
    def num_sequences(self) -> int:
        return len(self.trajectory_indices)

    @property
    def num_turns(self) -> int:
        return self.turn_index.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its tensors on `device`; the batch itself if they are there already.

        `cu_seqlens` stays in host memory: the host reads it in every pass, and would otherwise wait for the GPU.
        """
        if self.tokens.device == device:
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name not in ("trajectory_indices", "tree", "cu_seqlens")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The multiples to which lengths in a micro-batch are padded."""

    row: int = 1
    """For the whole row of T positions."""
    segment: int = 1
    """For every segment, which is a trajectory with its padding."""

    def segment_length(self, length: int) -> int:
        """Return the padded length of a trajectory of `length` positions."""
        return length + -length % self.segment


def alignment(parallel: ParallelConfig, fp8: Fp8Config) -> Alignment:
    """Return the alignment that layout and number format require together.

    Context parallelism divides every segment into 2 x `context` equal pieces (see `context_split`); sequence
    parallelism divides a rank's part of the row into `tensor` equal pieces; FP8 needs pieces of certain lengths.
    """
    segment = 2 * parallel.context if parallel.context > 1 else 1
    piece = (parallel.tensor if parallel.sequence else 1) * fp8.token_multiple
    return Alignment(row=math.lcm(parallel.context * piece, segment), segment=segment)


def packed_length(trajectory: Trajectory) -> int:
    """Return a trajectory's positions in a micro-batch: the number before its last sampled token; 0 without one."""
    turns = trajectory.turns
    while turns and not turns[-1].tokens:
        turns = turns[:-1]
    if not turns:
        return 0
    observed = sum(len(turn.observation_tokens) for turn in turns[:-1])
    return len(trajectory.prompt_tokens) + sum(len(turn.tokens) for turn in turns) + observed - 1


def pack(trajectories: Sequence[Trajectory], indices: Sequence[int], *, align: Alignment) -> PackedBatch:
    """Lay `trajectories[i] for i in indices` end to end, in that order.

    Trajectories without a sampled token and turns without tokens are left out. If no trajectory remains, the batch
    has `align.row` masked positions: the model can run it, and it contributes nothing.

    Args:
        trajectories: the list to which `indices`, `trajectory_indices` and `turn_trajectory` refer.
        align: multiples to which segments and T are rounded up; see `alignment`.

    Raises:
        ValueError: if a trajectory has an empty prompt (its first token has no predicting position) or a turn
            whose `rollout_logprobs` do not match its tokens.
    """
    kept = [index for index in indices if trajectories[index].num_sampled_tokens]
    spans: list[
        tuple[Sequence[int], int]
    ] = []  # tokens, each with its turn's number in this batch, or NOT_SAMPLED
    logprobs: list[Sequence[float]] = []
    turn_trajectory: list[int] = []
    turn_index: list[int] = []
    for index in kept:
        trajectory = trajectories[index]
        _check(trajectory, index)
        spans.append((trajectory.prompt_tokens, NOT_SAMPLED))
        for number, turn in enumerate(trajectory.turns):
            if turn.tokens:
                spans.append((turn.tokens, len(turn_index)))
                logprobs.append(turn.rollout_logprobs)
                turn_trajectory.append(index)
                turn_index.append(number)
            spans.append((turn.observation_tokens, NOT_SAMPLED))
        while spans[-1][1] == NOT_SAMPLED:  # nothing after the last sampled token is predicted
            spans.pop()
    # All sequences end to end, each up to its last target, which is one token more than its number of positions.
    read = _flat([tokens for tokens, _ in spans], np.int64)
    span_lengths = torch.tensor([len(tokens) for tokens, _ in spans], dtype=torch.int64)
    turns = torch.tensor([turn for _, turn in spans], dtype=torch.int64).repeat_interleave(span_lengths)
    read_logprobs = torch.zeros(len(read))
    read_logprobs[turns != NOT_SAMPLED] = _flat(logprobs, np.float32)

    lengths = [packed_length(trajectories[index]) for index in kept]
    segments = [align.segment_length(length) for length in lengths]
    num_padding = -sum(segments) % align.row if kept else align.row
    if num_padding:
        segments.append(num_padding)
    cu_seqlens = torch.tensor([0, *accumulate(segments)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in segments])
    sequence = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))  # [real]
    # For real positions: index of the token in `read`, and place in the row.
    source = torch.arange(len(sequence)) + sequence
    target = source + 1
    padding_before = torch.tensor([0, *accumulate(map(operator.sub, segments, lengths))], dtype=torch.int64)
    place = torch.arange(len(sequence)) + padding_before[sequence]

    def row_of(values: Tensor, fill: int = 0) -> Tensor:
        row = torch.full((1, len(positions)), fill, dtype=values.dtype)
        row[0, place] = values
        return row

    target_turns = turns[target]
    return PackedBatch(
        tokens=row_of(read[source]),
        positions=positions[None],
        cu_seqlens=cu_seqlens,
        targets=row_of(read[target]),
        loss_mask=row_of(target_turns != NOT_SAMPLED),
        turn_ids=row_of(target_turns.clamp(min=0)),
        sequence_ids=row_of(sequence, fill=PADDING),
        rollout_logprobs=row_of(read_logprobs[target]),
        trajectory_indices=tuple(kept),
        turn_trajectory=torch.tensor(turn_trajectory, dtype=torch.int64),
        turn_index=torch.tensor(turn_index, dtype=torch.int64),
    )


def empty_batch(align: Alignment) -> PackedBatch:
    """Return a micro-batch without trajectories, for ranks with fewer micro-batches than others."""
    return pack([], [], align=align)


def _check(trajectory: Trajectory, index: int) -> None:
    """Raise the ValueErrors that `pack` documents."""
    where = f"trajectory {index} ({trajectory.prompt_id})"
    if not trajectory.prompt_tokens:
        raise ValueError(f"{where} has an empty prompt")
    for number, turn in enumerate(trajectory.turns):
        if len(turn.rollout_logprobs) != len(turn.tokens):
            raise ValueError(
                f"{where}, turn {number}: {len(turn.rollout_logprobs)} log-probs for "
                f"{len(turn.tokens)} sampled tokens"
            )


def _flat(lists: Sequence[Sequence[float]], dtype: type) -> Tensor:
    """Concatenate all values."""
    return torch.from_numpy(
        np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in lists)])
    )
