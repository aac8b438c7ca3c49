"""The values of the `rollout` section that are refused."""

import numpy as np
import pytest

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import GainConfig, PartialConfig, RolloutConfig, TreeConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.io.errors import ConfigError


def test_dynamic_sampling_needs_groups_whose_rewards_can_differ():
    assert RolloutConfig(dynamic_sampling=True, group_size=2).max_draws == 10
    assert not RolloutConfig(group_size=1).dynamic_sampling
    with pytest.raises(ConfigError, match=r"rollout\.group_size is 1; allowed: >= 2 with rollout\.dynamic"):
        RolloutConfig(dynamic_sampling=True, group_size=1)


@pytest.mark.parametrize("temperature", [0.0, 0.009, 2.1])
def test_temperatures_that_the_engine_would_replace_are_refused(temperature):
    with pytest.raises(ConfigError, match=r"rollout\.temperature is .*; allowed: in \[0\.01, 2\]"):
        RolloutConfig(temperature=temperature)


def test_a_truncated_distribution_can_be_evaluated_but_not_trained_on():
    RolloutConfig(temperature=0.7).check_training()
    with pytest.raises(
        ConfigError, match=r"rollout\.top_p is 0\.9; allowed: 1\.0 for training, since .*evaluate"
    ):
        RolloutConfig(top_p=0.9).check_training()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            dict(group_size=8, tree=TreeConfig(initial=8)),
            r"rollout\.tree\.initial is 8; allowed: below rollout\.group_size \(8\), which includes the branches",
        ),
        (
            dict(group_size=8, tree=TreeConfig(initial=6, rounds=3)),
            r"rollout\.tree\.rounds is 3; allowed: at most 2, the number of branches",
        ),
        (
            dict(tree=TreeConfig(initial=6), partial=PartialConfig(tokens_per_step=100)),
            r"rollout\.tree\.initial is 6; allowed: 0 with rollout\.partial\.tokens_per_step > 0, since",
        ),
    ],
)
def test_trees_without_branches_or_of_unfinished_trajectories_are_refused(settings, line):
    with pytest.raises(ConfigError, match=line):
        RolloutConfig(**settings)


def configured(**sections):
    paths = dict(
        model=ModelConfig(path="m"), data=DataConfig(train="a", test="b"), search=SearchConfig(corpus="c")
    )
    return RunConfig(run=RunSettings(name="r"), **paths, **sections)


def test_a_group_of_one_is_refused_where_its_advantage_would_be_nothing():
    single = RolloutConfig(group_size=1)
    configured(rollout=single, algorithm=AlgorithmConfig(advantage="grpo", clip_beta=0.0)).check_training()
    with pytest.raises(
        ConfigError, match=r"rollout\.group_size is 1; allowed: >= 2 with .*=turn_group, which"
    ):
        configured(rollout=single).check_training()


def test_a_penalty_whose_gradient_is_nothing_in_the_mean_is_refused():
    configured(algorithm=AlgorithmConfig(kl_estimator="k1")).check_training()
    for estimator in ("k2", "k3"):
        configured(algorithm=AlgorithmConfig(kl_coef=1e-3, kl_estimator=estimator)).check_training()
    with pytest.raises(ConfigError, match=r"algorithm\.kl_estimator is 'k1'; allowed: k2 \| k3 with"):
        configured(algorithm=AlgorithmConfig(kl_coef=1e-3, kl_estimator="k1")).check_training()


@pytest.mark.parametrize("seed", [-1, 2**32, 1732790000000])
def test_seeds_that_not_every_generator_takes_are_refused(seed):
    np.random.seed(RunSettings(name="r", seed=2**32 - 1).seed)
    with pytest.raises(ConfigError, match=rf"run\.seed is {seed}; allowed: 0 to 4294967295"):
        RunSettings(name="r", seed=seed)


def test_a_scaffold_is_more_than_a_tag_that_may_be_left_out():
    for scaffold in ("", "<think>", "</think>"):
        with pytest.raises(ConfigError, match=r"rollout\.gain\.scaffold is .*; allowed: a text other than"):
            GainConfig(scaffold=scaffold)


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


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"algorithm": AlgorithmConfig(turn_signal="scores")}, r"policy with algorithm\.turn_signal=scores"),
        ({"parallel": ParallelConfig(context=2)}, r"policy with parallel\.context \(2\) > 1"),
    ],
)
def test_the_reference_scores_gains_only_where_it_can(sections, says):
    by_reference = RolloutConfig(gain=GainConfig(scorer="reference"))
    assert configured(rollout=by_reference).needs_reference
    with pytest.raises(ConfigError, match=r"rollout\.gain\.scorer is 'reference'; allowed: " + says):
        configured(rollout=by_reference, **sections)


def test_gains_by_the_reference_leave_the_engine_nothing_to_check():
    configured(rollout=RolloutConfig(gain=GainConfig(verify_every=5)))
    both = RolloutConfig(gain=GainConfig(scorer="reference", verify_every=5))
    with pytest.raises(
        ConfigError, match=r"verify_every is 5; allowed: 0 with rollout\.gain\.scorer=reference"
    ):
        configured(rollout=both)


def test_partial_rollouts_need_a_correction():
    sections = dict(
        run=RunSettings(name="r"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", test="unused"),
        search=SearchConfig(corpus="unused"),
    )
    assert not RunConfig(**sections).rollout.partial.is_on
    partial = PartialConfig(tokens_per_step=100, extra_prompts=8)
    rollout = RolloutConfig(prompts_per_step=64, partial=partial)
    with pytest.raises(
        ConfigError, match=r"tokens_per_step is 100; allowed: 0 without algorithm\.correction"
    ):
        RunConfig(**sections, rollout=rollout)
    corrected = AlgorithmConfig(correction=CorrectionConfig(kind="mask"))
    assert RunConfig(**sections, rollout=rollout, algorithm=corrected).rollout.partial.is_on


def test_prompts_on_demand_are_refused_with_partial_rollouts():
    partial = PartialConfig(tokens_per_step=100)
    with pytest.raises(ConfigError, match=r"assignment is 'on_demand'; allowed: fixed with rollout\.partial"):
        RolloutConfig(partial=partial, assignment="on_demand")


def test_no_more_may_be_carried_over_than_a_step_can_take():
    with pytest.raises(
        ConfigError, match=r"extra_prompts is 5; allowed: at most rollout\.prompts_per_step \(4\)"
    ):
        RolloutConfig(prompts_per_step=4, partial=PartialConfig(tokens_per_step=1, extra_prompts=5))
    with pytest.raises(ConfigError, match=r"extra_prompts is 5; allowed: >= 0, and 0 while"):
        PartialConfig(extra_prompts=5)
    partial = PartialConfig(tokens_per_step=1, extra_prompts=2, max_staleness=2)
    rollout = RolloutConfig(prompts_per_step=4, partial=partial)
    rollout.check_questions(6)
    with pytest.raises(ConfigError, match=r"extra_prompts is 2; .* \(6\) at most the number of .* \(5\)$"):
        rollout.check_questions(5)
    RolloutConfig(prompts_per_step=4, partial=PartialConfig(tokens_per_step=1)).check_questions(4)
    with pytest.raises(ConfigError, match=r"max_staleness is 0; allowed: >= 1"):
        PartialConfig(max_staleness=0)
