"""The advantage functions by their name in `algorithm.advantage`."""

from collections.abc import Callable

import torch.distributed as dist

from a2tgpo.advantage.grpo import outcome_advantages
from a2tgpo.advantage.igpo import joint_pool_advantages, separate_pool_advantages
from a2tgpo.advantage.turn_group import turn_group_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig

ESTIMATORS: dict[str, Callable[..., TurnAdvantages]] = {
    "turn_group": turn_group_advantages,
    "igpo_joint": joint_pool_advantages,
    "igpo_separate": separate_pool_advantages,
    "grpo": outcome_advantages,
}


def compute_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Advantages by the configured method; every rank of `dp_group` must call this."""
    return ESTIMATORS[config.advantage](table, config, dp_group=dp_group)
