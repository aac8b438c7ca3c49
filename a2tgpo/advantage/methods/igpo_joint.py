"""IGPO with one pool: gains and outcomes of a prompt are normalised together (Eq. 4-5)."""

import torch.distributed as dist

from a2tgpo.advantage.pooled import pooled_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return IGPO's advantages. Each prompt has one pool, which contains its gains and its outcomes."""
    return pooled_advantages(table, config, outcome_pool=table.prompt_index, dp_group=dp_group)
