"""IGPO with two pools: a prompt's gains are normalised in one pool, and its outcomes in the other."""

import torch.distributed as dist

from a2tgpo.advantage.pooled import pooled_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return IGPO's advantages. Each prompt has one pool for its gains and another pool for its outcomes."""
    return pooled_advantages(
        table, config, outcome_pool=table.prompt_index + table.num_prompts, dp_group=dp_group
    )
