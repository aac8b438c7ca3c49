"""GiGPO's advantage (arXiv:2505.10978) compares trajectories of equal prompts, and turns written in equal states.

    A_{i,t} = A^E_i + alpha A^S_{i,t}                                                                     (Eq. 8)

A^E is GRPO's advantage (Eq. 3): R_i normalised within its prompt's group. Every turn, including the final turn, has
the return gamma^{T_i - t} R_i (Eq. 5 with the outcome as the only reward). All turns of a prompt that were written in
the same state form a step group (Eq. 6). A^S is the return normalised within the step group (Eq. 7).

Decisions that the paper leaves open:
- Two states are the same only if their queries and their passages are equal (`anchor_state.turn_states`).
- A^E and A^S are divided by the sample standard deviation if `normalize_by_std` is set (F_norm in the paper).
- A turn that is alone in its step group has A^S = 0.
- A trajectory counts once in its prompt's statistics. The authors' code counts a trajectory once per turn.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import place_turns
from a2tgpo.advantage.anchor_state import NO_STATE
from a2tgpo.advantage.group_norm import index_groups, normalize_groups
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the advantages A^E + alpha A^S of all turns."""
    outcome = grpo_outcome(table, config, dp_group=dp_group)
    no_gain = torch.zeros_like(table.info_gain)
    episode = place_turns(no_gain, outcome, table.num_process_turns)
    return TurnAdvantages(
        advantages=episode + config.alpha * step_advantages(table, config, dp_group=dp_group),
        normalized_gain=no_gain,
        normalized_outcome=outcome,
    )


def step_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return A^S, the returns normalised within their step groups: [N, T + 1] float64, 0 past the last turn."""
    written = table.state != NO_STATE
    rows, columns = written.nonzero(as_tuple=True)
    turns_to_come = written.sum(dim=1)[rows] - 1 - columns  # T_i - t
    group_index, num_groups = index_groups(table.state[rows, columns], dp_group=dp_group)
    steps = table.outcome.new_zeros(table.state.shape)
    steps[rows, columns] = normalize_groups(
        table.outcome[rows] * config.gamma ** turns_to_come.double(),
        group_index,
        num_groups=num_groups,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
    )
    return steps
