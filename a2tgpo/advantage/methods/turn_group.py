"""A2TGPO's advantage (arXiv:2605.06200): gains are normalised in turn groups, summed and rescaled."""

import torch.distributed as dist

from a2tgpo.advantage.accumulate import accumulate_process_turns, place_turns
from a2tgpo.advantage.turn_groups import normalize_outcomes, normalize_turn_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the advantages of all turns (Eq. 6-9).

    A process turn's advantage is alpha D_{i,t} / sqrt(n_i - t + 1) + R_i, where R_i is the normalised outcome. The
    final turn's advantage is R_i.
    """
    normalized_gain, spread = normalize_turn_groups(table, table.has_gain, config, dp_group=dp_group)
    outcome = normalize_outcomes(table, config, dp_group=dp_group)
    accumulated = accumulate_process_turns(
        normalized_gain, table.num_process_turns, gamma=config.gamma, rescale=config.rescale
    )
    return TurnAdvantages(
        advantages=place_turns(config.alpha * accumulated, outcome, table.num_process_turns),
        normalized_gain=normalized_gain,
        normalized_outcome=outcome,
        gain_spread=spread,
    )
