"""AT2PO's advantage (arXiv:2601.04767): the value of a turn in the tree of its prompt's trajectories.

    A_n = V_n,    V_n = sum_c w_c V_c,    w = softmax of the entropies of n's children c

The value of a leaf, which is the last turn of a trajectory, is the trajectory's outcome, normalised in its prompt's
group by the population standard deviation. The entropy of a turn is the mean of -log p over its sampled tokens.

These formulas follow the authors' scripts (leaf_value_norm, child_softmax, node_value). Their code also offers a mean
over children or over leaves as V_n, and the difference of V_n from the value of the parent or of the root as A_n.

As in their code, the loss covers every trajectory as a whole, so a turn that several trajectories share enters the
loss several times. If a reward could not judge a trajectory, the trajectory has no leaf in the tree.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.tree_values import gather_paths, paths_of, softmax_values
from a2tgpo.advantage.turn_groups import normalize_outcomes
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the values of all turns, and 0 past each trajectory's last turn. Gains are not used."""
    outcome = normalize_outcomes(table, config, dp_group=dp_group)
    own = paths_of(table.trajectories, outcome.tolist())
    values = softmax_values(gather_paths(own, dp_group=dp_group))
    rows = [[values[node] for node in path.nodes] for path in own]
    padded = [row + [0.0] * (table.max_turns + 1 - len(row)) for row in rows]
    return TurnAdvantages(
        advantages=torch.tensor(padded, dtype=torch.float64).reshape(len(rows), table.max_turns + 1),
        normalized_gain=torch.zeros_like(table.info_gain),
        normalized_outcome=outcome,
    )
