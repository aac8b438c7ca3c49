import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.config.check import ConfigError
from a2tgpo.data.sampler import PromptSampler

SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(SIZES, st.integers(0, 5), st.integers(1, 12))
def test_every_epoch_asks_each_question_once_and_no_step_asks_one_twice(sizes, seed, num_steps):
    num_questions, per_step = sizes
    sampler = PromptSampler(num_questions, per_step, seed)
    steps = [sampler.next_indices() for _ in range(num_steps)]
    assert all(len(step) == per_step == len(set(step)) for step in steps)
    stream = list(chain.from_iterable(steps))
    for start in range(0, len(stream) - num_questions + 1, num_questions):
        assert sorted(stream[start : start + num_questions]) == list(range(num_questions))


@given(SIZES, st.integers(0, 5), st.integers(0, 8))
def test_resumed_sampler_goes_on_as_if_never_stopped(sizes, seed, stop_at):
    num_questions, per_step = sizes
    whole = PromptSampler(num_questions, per_step, seed)
    for _ in range(stop_at):
        whole.next_indices()
    resumed = PromptSampler(num_questions, per_step, seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed.next_indices() for _ in range(5)] == [whole.next_indices() for _ in range(5)]


def test_epochs_and_seeds_differ():
    one, two = PromptSampler(50, 50, 1), PromptSampler(50, 50, 2)
    first = one.next_indices()
    assert first != one.next_indices()
    assert first != two.next_indices()


def test_step_larger_than_the_set_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"rollout\.prompts_per_step is 9; allowed: at most .*\(8\)$"):
        PromptSampler(8, 9, 0)


@pytest.mark.parametrize(("other", "says"), [((9, 2, 0), "data.train is 9"), ((8, 2, 1), "run.seed is 1")])
def test_state_of_other_data_or_seed_is_refused(other, says):
    with pytest.raises(ConfigError, match=says):
        PromptSampler(*other).load_state_dict(PromptSampler(8, 2, 0).state_dict())
