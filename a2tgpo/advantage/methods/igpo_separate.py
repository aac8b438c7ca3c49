"""IGPO with two pools: gains of a prompt are normalised in one, outcomes in another."""

import torch.distributed as dist

from a2tgpo.advantage.pooled import pooled_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Gains of a prompt normalised in one pool, outcomes in another."""
    return pooled_advantages(
        table, config, outcome_pool=table.prompt_index + table.num_prompts, dp_group=dp_group
    )
