"""GRPO's advantage (DeepSeekMath): every turn gets its trajectory's outcome, normalised within the prompt's group."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import place_turns
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return for every turn the outcome R_i, normalised within the prompt's group. Gains are not used."""
    outcome = grpo_outcome(table, config, dp_group=dp_group)
    no_gain = torch.zeros_like(table.info_gain)
    return TurnAdvantages(
        advantages=place_turns(no_gain, outcome, table.num_process_turns),
        normalized_gain=no_gain,
        normalized_outcome=outcome,
    )
