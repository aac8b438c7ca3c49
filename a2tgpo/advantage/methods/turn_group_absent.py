"""A2TGPO's advantage with one change: a turn that a trajectory did not take has gain 0.

In Eq. 6-9 of arXiv 2605.06200, a turn is compared only with trajectories that took it. The normalised gains of a turn
group then have mean 0 over the trajectories that took the turn, so taking it earns no credit from gains on average,
even if the turn is useful.

Here K is the largest number of process turns in the prompt's group. A trajectory with n_i < K process turns has gain
0 at the turns n_i + 1 .. K. These zeros are members of their turn groups. The advantage of every turn, including the
final turn, sums the normalised gains from the turn's own index to K:

    A_{i,t} = alpha sum_{k=t}^{K} gamma^{k-t} g_{i,k} / sqrt(K - t + 1) + R_i,    1 <= t <= n_i + 1

With gamma 1 and without division by standard deviations, the sum is what the trajectory gains from turn t on, minus
the group's mean of the same quantity. If n_i = K, the sum of the final turn is empty.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import accumulate_process_turns
from a2tgpo.advantage.turn_groups import deepest_turns, normalize_outcomes, normalize_turn_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the advantages of all turns. A turn whose gain is unknown has normalised gain 0."""
    deepest = deepest_turns(table, dp_group=dp_group)
    columns = torch.arange(table.max_turns + 1)
    absent = (columns[:-1] >= table.num_process_turns[:, None]) & (columns[:-1] < deepest[:, None])
    normalized, spread = normalize_turn_groups(table, table.has_gain | absent, config, dp_group=dp_group)
    outcome = normalize_outcomes(table, config, dp_group=dp_group)
    sums = accumulate_process_turns(normalized, deepest, gamma=config.gamma, rescale=config.rescale)
    in_trajectory = columns <= table.num_process_turns[:, None]
    total = torch.nn.functional.pad(config.alpha * sums, (0, 1)) + outcome[:, None]
    return TurnAdvantages(
        advantages=total.where(in_trajectory, 0.0),
        normalized_gain=normalized.where(table.has_gain, 0.0),
        normalized_outcome=outcome,
        gain_spread=spread,
    )
