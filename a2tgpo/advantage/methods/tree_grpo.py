"""Tree-GRPO's advantage (arXiv:2509.21240): a trajectory is compared within its tree and within its prompt.

    A_i = z_tree(R_i) + z_prompt(R_i)    for all turns of trajectory i                            (Eq. 6 and 7)

A tree is an initial trajectory with its branches, the branches of these branches, and so on. Both z-scores use the
sample standard deviation, as GRPO does. A trajectory that is alone in its tree has z_tree = 0.

The paper's objective (Eq. 8) sums over all tokens of all trajectories, so a turn that several trajectories share
enters the loss several times. Where branches part, the difference between their advantages shows which subtree has
the better outcomes.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import place_turns
from a2tgpo.advantage.group_norm import index_groups, normalize_groups
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig

_MAX_ROOTS = 2**31
"""A number that is larger than every sample index."""


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return for every turn the sum of the trajectory's two z-scores. Gains are not used."""
    roots = torch.tensor([trajectory.root for trajectory in table.trajectories], dtype=torch.int64)
    tree_index, num_trees = index_groups(table.prompt_index * _MAX_ROOTS + roots, dp_group=dp_group)
    within_tree = normalize_groups(
        table.outcome,
        tree_index,
        num_groups=num_trees,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
    )
    outcome = grpo_outcome(table, config, dp_group=dp_group)
    no_gain = torch.zeros_like(table.info_gain)
    return TurnAdvantages(
        advantages=place_turns(no_gain, within_tree + outcome, table.num_process_turns),
        normalized_gain=no_gain,
        normalized_outcome=outcome,
    )
