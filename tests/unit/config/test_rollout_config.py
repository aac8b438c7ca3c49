"""What the `rollout` section refuses."""

import pytest

from a2tgpo.config.check import ConfigError
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import GainConfig, RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig


def test_dynamic_sampling_needs_groups_whose_rewards_can_differ():
    assert RolloutConfig(dynamic_sampling=True, group_size=2).max_draws == 10
    assert not RolloutConfig(group_size=1).dynamic_sampling
    with pytest.raises(ConfigError, match=r"rollout\.group_size is 1; allowed: >= 2 with rollout\.dynamic"):
        RolloutConfig(dynamic_sampling=True, group_size=1)


def test_checks_of_gain_by_the_trainer_are_refused_where_sequences_are_divided():
    sections = dict(
        run=RunSettings(name="r"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", test="unused"),
        search=SearchConfig(corpus="unused"),
        parallel=ParallelConfig(context=2),
    )
    assert RunConfig(**sections).rollout.gain.verify_every == 0
    with pytest.raises(
        ConfigError, match=r"gain\.verify_every is 5; allowed: 0 with parallel\.context \(2\)"
    ):
        RunConfig(**sections, rollout=RolloutConfig(gain=GainConfig(verify_every=5)))
