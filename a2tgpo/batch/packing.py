"""Trajectories laid end to end in one row of tokens, every field aligned on the predicting position.

A trajectory with tokens x_0 .. x_{n-1} becomes the inputs x_0 .. x_{m-1} and the targets x_1 .. x_m, where
x_m is the last token the policy sampled: nothing after it is ever predicted, so a closing observation is not
run. At position k the model has read `tokens[k]` and `logprobs[k]` is log p(`targets[k]`), so `loss_mask`,
`turn_ids` and `rollout_logprobs` speak of `targets[k]`, not of `tokens[k]`.
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

from a2tgpo.batch.tree import TreeNode
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.trajectory import Trajectory

PADDING = -1
"""`sequence_ids` of positions that belong to no trajectory."""
NOT_SAMPLED = -1
"""The turn of tokens that the policy did not sample."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S trajectories in one row of T positions, U turns.

    Positions that only fill a segment up to the alignment are at its end, where no other position attends to them;
    those that fill the row form one last segment of their own. They are masked everywhere.
    """

    tokens: Tensor
    """[1, T] int64, what the model reads."""
    positions: Tensor
    """[1, T] int64, 0 at the start of every segment."""
    cu_seqlens: Tensor
    """[segments + 1] int32, where segments begin and end; the last entry is T. Stays in host memory, see `to`."""
    targets: Tensor
    """[1, T] int64, the token that follows; 0 on padding."""
    loss_mask: Tensor
    """[1, T] bool, True where the target's log-prob is asked for: where the policy sampled it."""
    turn_ids: Tensor
    """[1, T] int64 in [0, U), the turn that the target belongs to; 0 where masked."""
    sequence_ids: Tensor
    """[1, T] int64 in [0, S), the trajectory in this micro-batch; PADDING on padding."""
    rollout_logprobs: Tensor
    """[1, T] float32, the engine's log p of the target, nats; 0 where masked."""
    trajectory_indices: tuple[int, ...]
    """[S], where the trajectories stand in the list they were packed from."""
    turn_trajectory: Tensor
    """[U] int64, the turn's trajectory as an index into that same list."""
    turn_index: Tensor
    """[U] int64, 0-based place of the turn in its trajectory."""
    tree: tuple[TreeNode, ...] | None = None
    """Who attends to whom, where it is not everyone to those before it in its segment; see `probes`."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.size(1)

    @property
    def num_sequences(self) -> int:
        return len(self.trajectory_indices)

    @property
    def num_turns(self) -> int:
        return self.turn_index.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`; itself where they are there already.

        But for `cu_seqlens`: the host lays out each pass by them, and would wait for the card to read them back.
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
    """What lengths in a micro-batch must be multiples of."""

    row: int = 1
    """The whole row, T."""
    segment: int = 1
    """Every segment: a trajectory's positions and the padding behind them."""

    def segment_length(self, length: int) -> int:
        """Positions that a trajectory of `length` takes in the row."""
        return length + -length % self.segment


def alignment(parallel: ParallelConfig, fp8: Fp8Config) -> Alignment:
    """The rules of the layout and the number format, all of them.

    Context parallelism deals 2 x `context` equal pieces of every segment out (see `context_split`); sequence
    parallelism cuts what a rank then has of the row into `tensor` equal pieces; FP8 takes pieces of certain lengths.
    """
    segment = 2 * parallel.context if parallel.context > 1 else 1
    piece = (parallel.tensor if parallel.sequence else 1) * fp8.token_multiple
    return Alignment(row=math.lcm(parallel.context * piece, segment), segment=segment)


def packed_length(trajectory: Trajectory) -> int:
    """Positions a trajectory takes in a micro-batch: all before its last sampled token; 0 without one."""
    turns = trajectory.turns
    while turns and not turns[-1].tokens:
        turns = turns[:-1]
    if not turns:
        return 0
    observed = sum(len(turn.observation_tokens) for turn in turns[:-1])
    return len(trajectory.prompt_tokens) + sum(len(turn.tokens) for turn in turns) + observed - 1


def pack(trajectories: Sequence[Trajectory], indices: Sequence[int], *, align: Alignment) -> PackedBatch:
    """Lay `trajectories[i] for i in indices` end to end, in that order.

    A trajectory without a sampled token has nothing to teach and is left out, as is a turn without tokens.
    With nothing left the batch is `align.row` masked positions: the model can run it, and it adds nothing.

    Args:
        trajectories: the list that `indices`, `trajectory_indices` and `turn_trajectory` point into.
        align: segments and T are rounded up to multiples; see `alignment`.

    Raises:
        ValueError: if a trajectory has an empty prompt (its first token has no predicting position) or a turn
            whose `rollout_logprobs` do not match its tokens.
    """
    kept = [index for index in indices if trajectories[index].num_sampled_tokens]
    spans: list[tuple[Sequence[int], int]] = []  # tokens, and their turn's number here or NOT_SAMPLED
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
    # All sequences end to end, each up to its last target: one token more than it has positions.
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
    # Of real positions: where `read` has the token, and where the row does.
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
    """A micro-batch without trajectories, for ranks that must keep step with others that still have some."""
    return pack([], [], align=align)


def _check(trajectory: Trajectory, index: int) -> None:
    """Raise ValueError where `pack` says so."""
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
    """All values end to end."""
    return torch.from_numpy(
        np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in lists)])
    )
