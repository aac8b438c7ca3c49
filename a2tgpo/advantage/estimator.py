"""Compute advantages with the method that the configuration names."""

from collections.abc import Sequence

import torch
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
    fits = isinstance(found, TurnAdvantages) and _has_shape(found.advantages, shape)
    rule = "a function that returns TurnAdvantages with one value per turn (docs/methods.md)"
    require(fits, ADVANTAGE.key, config.advantage, rule)
    if found.token_offsets is not None:
        fits = (
            isinstance(found.token_offsets, Sequence)
            and len(found.token_offsets) == len(table.trajectories)
            and all(
                _has_shape(offsets, (trajectory.num_sampled_tokens,))
                for offsets, trajectory in zip(found.token_offsets, table.trajectories, strict=True)
            )
        )
        rule = (
            "a function whose token_offsets have one tensor per trajectory, with one value per sampled token "
            "(docs/methods.md)"
        )
        require(fits, ADVANTAGE.key, config.advantage, rule)
    return found


def _has_shape(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape
