"""Compute advantages with the method that the configuration names."""

import importlib

import torch.distributed as dist

from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import METHODS_PACKAGE, AlgorithmConfig


def compute_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Compute advantages with the method in `advantage/methods/` that `algorithm.advantage` names.

    Every rank of `dp_group` must call this, even with an empty table.
    """
    method = importlib.import_module(f"{METHODS_PACKAGE}.{config.advantage}")
    return method.advantages(table, config, dp_group=dp_group)
