"""Pack a sequence together with all texts that are scored after its prefixes, so that the model runs the sequence
once.

The diagram shows the tokens of such a row, and the position of each token:

    row        trunk x_0 .. x_{n-1} | scaffold answer | scaffold answer | ...
    positions  0 .. n-1             | c_0, c_0 + 1 .. | c_1, c_1 + 1 .. | ...

A branch that continues the first c tokens of the trunk attends to these tokens and to itself. Its positions start at
c. Therefore every log-prob is the same as in a separate sequence that consists of these c tokens and the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a2tgpo.batch.packing import PADDING, Alignment, PackedBatch, TreeNode


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A request for the log-prob of `answer` after the sequence's first `prefix_length` tokens and the `scaffold`."""

    prefix_length: int
    """Number of tokens, >= 1."""
    scaffold: tuple[int, ...]
    """Token ids, at least one, because the last token of the scaffold predicts the first token of the answer."""
    answer: tuple[int, ...]
    """Token ids, at least one."""

    @property
    def branch(self) -> tuple[int, ...]:
        """The tokens that the model reads after the prefix: the scaffold, and the answer without its last token."""
        return (*self.scaffold, *self.answer[:-1])


@dataclass(frozen=True, kw_only=True)
class ProbedSequence:
    """A sequence of token ids, and the probes that branch off from it."""

    tokens: Sequence[int]
    probes: Sequence[Probe]

    @property
    def trunk_length(self) -> int:
        """Number of tokens in the longest prefix of a probe. 0 if there are no probes."""
        return max((probe.prefix_length for probe in self.probes), default=0)

    @property
    def packed_length(self) -> int:
        """Number of positions of the trunk and of all branches."""
        return self.trunk_length + sum(len(probe.branch) for probe in self.probes)


def pack_probes(
    sequences: Sequence[ProbedSequence], indices: Sequence[int], *, align: Alignment
) -> PackedBatch:
    """Pack `sequences[i] for i in indices` as trees into one row. Sequences without probes are left out.

    In the returned batch, each probe takes the place of a turn. `loss_mask` is True at positions that predict a token
    of an answer. `turn_trajectory` has the index of each probe's sequence, and `turn_index` has the probe's index in
    its sequence. `cu_seqlens` describes the whole row as one segment, because `tree` determines the attention.
    """
    assert align.segment == 1, "context-parallel ranks cannot divide a tree"
    tokens: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    turn_ids: list[int] = []
    sequence_ids: list[int] = []
    nodes: list[TreeNode] = []
    turn_trajectory: list[int] = []
    turn_index: list[int] = []
    kept = [index for index in indices if sequences[index].probes]
    for number, index in enumerate(kept):
        sequence, start = sequences[index], len(tokens)
        length = sequence.trunk_length
        assert length <= len(sequence.tokens), f"a probe of sequence {index} branches off past its end"
        tokens += sequence.tokens[:length]
        positions += range(length)
        targets += [0] * length
        turn_ids += [-1] * length
        nodes.append(TreeNode(start=start, end=len(tokens)))
        for place, probe in enumerate(sequence.probes):
            assert probe.prefix_length and probe.scaffold and probe.answer, f"{probe} has an empty part"
            first, branch = len(tokens), probe.branch
            num_unscored = len(probe.scaffold) - 1
            tokens += branch
            positions += range(probe.prefix_length, probe.prefix_length + len(branch))
            targets += [0] * num_unscored + list(probe.answer)
            turn_ids += [-1] * num_unscored + [len(turn_index)] * len(probe.answer)
            nodes.append(
                TreeNode(
                    start=first,
                    end=len(tokens),
                    prefix_start=start,
                    prefix_end=start + probe.prefix_length,
                )
            )
            turn_trajectory.append(index)
            turn_index.append(place)
        sequence_ids += [number] * (len(tokens) - start)
    num_padding = -len(tokens) % align.row if tokens else align.row
    padding = [0] * num_padding
    masked = torch.tensor([turn_ids + [-1] * num_padding])  # [1, T]
    return PackedBatch(
        tokens=torch.tensor([tokens + padding]),
        positions=torch.tensor([positions + padding]),
        cu_seqlens=torch.tensor([0, len(tokens) + num_padding], dtype=torch.int32),
        targets=torch.tensor([targets + padding]),
        loss_mask=masked >= 0,
        turn_ids=masked.clamp(min=0),
        sequence_ids=torch.tensor([sequence_ids + [PADDING] * num_padding]),
        rollout_logprobs=torch.zeros(1, len(tokens) + num_padding),
        trajectory_indices=tuple(kept),
        turn_trajectory=torch.tensor(turn_trajectory, dtype=torch.int64),
        turn_index=torch.tensor(turn_index, dtype=torch.int64),
        tree=tuple(nodes),
    )
