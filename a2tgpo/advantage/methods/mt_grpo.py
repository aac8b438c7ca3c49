"""MT-GRPO's advantage (arXiv:2505.11821): outcomes and rewards of single turns are normalised separately, then added.

    A_{i,t} = A^O_i + alpha A^T_{i,t} in a process turn,    A^O_i in the final turn

A^O is GRPO's advantage. A^T is the turn's reward r_{i,t}, normalised in its turn group. The reward is the turn's
gain, or its score if `algorithm.turn_signal` is `scores`. If a trajectory has no process turns, its advantage is the
z-score of its outcome among the sums R_i + sum_t r_{i,t} of its prompt's trajectories, as in the authors' code.

The authors' code has one reward for the turns before the first result, and none for later turns. Here every process
turn has its own reward. Turn groups use the population standard deviation, as in A2TGPO.
"""

import torch.distributed as dist

from a2tgpo.advantage.accumulate import place_turns
from a2tgpo.advantage.grpo_outcome import grpo_normalized, grpo_outcome
from a2tgpo.advantage.turn_groups import normalize_turn_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the advantages of all turns. A turn whose reward is unknown has A^T = 0."""
    normalized_reward, spread = normalize_turn_groups(table, table.has_gain, config, dp_group=dp_group)
    outcome = grpo_outcome(table, config, dp_group=dp_group)
    combined = grpo_normalized(table.outcome + table.info_gain.sum(dim=1), table, config, dp_group=dp_group)
    last = outcome.where(table.num_process_turns > 0, combined)
    return TurnAdvantages(
        advantages=place_turns(config.alpha * normalized_reward, last, table.num_process_turns),
        normalized_gain=normalized_reward,
        normalized_outcome=outcome,
        gain_spread=spread,
    )
