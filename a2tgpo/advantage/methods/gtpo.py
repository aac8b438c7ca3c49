"""GTPO's advantage (arXiv:2511.14846): discounted returns, normalised over all turns of a prompt's trajectories.

    r_{i,t} = alpha ig_{i,t} in a process turn (0 if its gain is unknown),    R_i in the final turn
    A_{i,t} = (G_{i,t} - mean) / std,    G_{i,t} = sum_{k >= t} gamma^{k-t} r_{i,k}

IGPO normalises the rewards and then sums them. GTPO sums the rewards and then normalises the sums.

Decisions that the paper's abstract leaves open:
- The mean and the sample standard deviation cover all turns of a prompt.
- If a trajectory was cut after an observation, its last process turn also gets the reward R_i.

Differences from the paper:
- A turn's reward is its gain. The paper rewards the format of a turn's tool call instead.
- The paper's rewards for failed trajectories whose code resembles that of successful ones are left out.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import discounted_suffix_sums
from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the normalised returns of all turns, and 0 past each trajectory's last turn."""
    rewards = torch.nn.functional.pad(config.alpha * table.info_gain, (0, 1))  # [N, T + 1]
    rewards.scatter_add_(1, table.last_turn[:, None], table.outcome[:, None])
    rows, columns = (torch.arange(table.max_turns + 1) <= table.last_turn[:, None]).nonzero(as_tuple=True)
    normalized = torch.zeros_like(rewards)
    normalized[rows, columns] = normalize_groups(
        discounted_suffix_sums(rewards, gamma=config.gamma)[rows, columns],
        table.prompt_index[rows],
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
    )
    return TurnAdvantages(
        advantages=normalized,
        normalized_gain=torch.zeros_like(table.info_gain),
        normalized_outcome=grpo_outcome(table, config, dp_group=dp_group),
    )
