"""Compute advantages with the method that the configuration names."""

import torch.distributed as dist

from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import ADVANTAGE
from a2tgpo.io.errors import require


def compute_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Compute advantages with the method that `algorithm.advantage` names.

    Every rank of `dp_group` must call this, even with an empty table.

    Raises:
        ConfigError: with a one-line message, if a user's own method fails or returns advantages of the wrong shape.
    """
    found = ADVANTAGE.load(config.advantage)(table, config, dp_group=dp_group)
    shape = (*table.info_gain.shape[:1], table.max_turns + 1)
    fits = isinstance(found, TurnAdvantages) and found.advantages.shape == shape
    rule = "a function that returns TurnAdvantages with one value per turn (docs/methods.md)"
    require(fits, ADVANTAGE.key, config.advantage, rule)
    if found.token_offsets is not None:
        lengths = [trajectory.num_sampled_tokens for trajectory in table.trajectories]
        fits = [offsets.numel() for offsets in found.token_offsets] == lengths
        rule = "a function whose token_offsets have one value per sampled token (docs/methods.md)"
        require(fits, ADVANTAGE.key, config.advantage, rule)
    return found
