"""HGPO's advantage (arXiv:2602.22817): a turn is compared with turns that were written after the same history.

K is `algorithm.hgpo_history`. A turn has up to K + 1 groups, numbered k = 1 .. K + 1. Its group k consists of the
turns of the same prompt that were written after the same last k states (`anchor_state.turn_states`). Turn t, counted
from 1, has groups for k <= t only.

    A_{i,t} = sum_k w_k z_k(gamma^{T_i - t} R_i),    w_k = (k + 1)^alpha / sum_j (j + 1)^alpha

z_k is the z-score in group k, with the population standard deviation. The sums run over the groups of the turn that
have at least two members. A turn without such a group has advantage 0.

The weights w_k are those of the authors' code. As in their scripts (`base_group` is false), no advantage of the whole
trajectory is added. Their code also skips groups in which the z-score is exactly 0. Here these groups keep their
weight. As in their code, a trajectory that repeats a state may have several turns in one group.
"""

import hashlib
from array import array

import torch
import torch.distributed as dist

from a2tgpo.advantage.anchor_state import NO_STATE
from a2tgpo.advantage.group_norm import group_sums, index_groups, normalize_groups
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the weighted mean of each turn's z-scores in its groups."""
    written = table.state != NO_STATE
    turns_to_come = (written.sum(dim=1, keepdim=True) - 1 - torch.arange(table.max_turns + 1)).clamp(min=0)
    returns = table.outcome[:, None] * config.gamma ** turns_to_come.double()  # [N, T + 1]
    total, weights = torch.zeros_like(returns), torch.zeros_like(returns)
    for length in range(1, config.hgpo_history + 2):
        rows, columns = (written & (torch.arange(table.max_turns + 1) >= length - 1)).nonzero(as_tuple=True)
        keys = _history_keys(table.state, rows, columns, length)
        group_index, num_groups = index_groups(keys, dp_group=dp_group)
        one = torch.ones(1, len(rows), dtype=torch.float64)
        members = group_sums(one, group_index, num_groups=num_groups, dp_group=dp_group)[0]
        weight = (length + 1.0) ** config.alpha * (members[group_index] > 1)
        scores = normalize_groups(
            returns[rows, columns],
            group_index,
            num_groups=num_groups,
            dp_group=dp_group,
            by_std=config.normalize_by_std,
        )
        total[rows, columns] += weight * scores
        weights[rows, columns] += weight
    return TurnAdvantages(
        advantages=total / weights.where(weights > 0, 1.0),
        normalized_gain=torch.zeros_like(table.info_gain),
        normalized_outcome=grpo_outcome(table, config, dp_group=dp_group),
    )


def _history_keys(
    states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, length: int
) -> torch.Tensor:
    """Return a key in [0, 2^63) for the last `length` states of each turn (rows[j], columns[j]), [n] int64."""
    histories = states[rows[:, None], columns[:, None] + torch.arange(1 - length, 1)].tolist()
    digests = [hashlib.blake2b(array("q", history), digest_size=8).digest() for history in histories]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)
