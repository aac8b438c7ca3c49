"""What the `rollout` section refuses."""

import pytest

from a2tgpo.config.check import ConfigError
from a2tgpo.config.rollout import RolloutConfig


def test_dynamic_sampling_needs_groups_whose_rewards_can_differ():
    assert RolloutConfig(dynamic_sampling=True, group_size=2).max_draws == 10
    assert not RolloutConfig(group_size=1).dynamic_sampling
    with pytest.raises(ConfigError, match=r"rollout\.group_size is 1; allowed: >= 2 with rollout\.dynamic"):
        RolloutConfig(dynamic_sampling=True, group_size=1)
