import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.data.sampler import PromptSampler
from a2tgpo.io.errors import ConfigError

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


def dealt_by_the_definition(num_questions: int, per_step: int, seed: int, num_steps: int) -> list[list[int]]:
    """Return the questions of each step. Epoch e has the order of default_rng([seed, e]), and questions that are
    already in its first step come last.
    """
    steps: list[list[int]] = [[]]
    for epoch in range(num_steps * per_step // num_questions + 2):
        order = np.random.default_rng([seed, epoch]).permutation(num_questions).tolist()
        begun = steps[-1] if len(steps[-1]) < per_step else []
        for index in [i for i in order if i not in begun] + [i for i in order if i in begun]:
            if len(steps[-1]) == per_step:
                steps.append([])
            steps[-1] = [*steps[-1], index]
    return steps[:num_steps]


@given(SIZES, st.integers(0, 5), st.integers(1, 12))
def test_whole_steps_follow_the_definition(sizes, seed, num_steps):
    """The order must not change, because recorded runs depend on it."""
    sampler = PromptSampler(*sizes, seed)
    found = [sampler.next_indices() for _ in range(num_steps)]
    assert found == dealt_by_the_definition(*sizes, seed, num_steps)


def test_the_order_of_a_recorded_run_stands():
    sampler = PromptSampler(7, 3, 5)
    assert [sampler.next_indices() for _ in range(4)] == [[1, 4, 2], [3, 6, 5], [0, 4, 2], [6, 5, 3]]


@st.composite
def drawn_steps(draw) -> tuple[int, int, list[list[int]]]:
    """Draw (num_questions, per_step, sizes of the draws of each step)."""
    num_questions, per_step = draw(SIZES)
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        sizes, left = [per_step], num_questions - per_step
        for _ in range(draw(st.integers(0, 5))):
            if left:
                sizes.append(draw(st.integers(1, min(left, per_step))))
                left -= sizes[-1]
        steps.append(sizes)
    return num_questions, per_step, steps


def deal(sampler: PromptSampler, sizes: list[int]) -> list[int]:
    asked: list[int] = []
    for size in sizes:
        asked += sampler.next_indices(size, excluded=asked)
    return asked


@given(drawn_steps(), st.integers(0, 5))
def test_a_step_of_several_draws_asks_nothing_twice_and_epochs_stay_whole(case, seed):
    num_questions, per_step, steps = case
    sampler = PromptSampler(num_questions, per_step, seed)
    stream: list[int] = []
    for sizes in steps:
        asked = deal(sampler, sizes)
        assert len(asked) == sum(sizes) == len(set(asked))
        stream += asked
    for start in range(0, len(stream) - num_questions + 1, num_questions):
        assert sorted(stream[start : start + num_questions]) == list(range(num_questions))


@given(drawn_steps(), st.integers(0, 5))
def test_several_draws_are_dealt_what_one_of_their_size_would_be_and_resume_exactly(case, seed):
    num_questions, per_step, steps = case
    whole, drawn = PromptSampler(num_questions, per_step, seed), PromptSampler(num_questions, per_step, seed)
    for sizes in steps:
        assert deal(drawn, sizes) == whole.next_indices(sum(sizes))
        resumed = PromptSampler(num_questions, per_step, seed)
        resumed.load_state_dict(json.loads(json.dumps(drawn.state_dict())))
        drawn = resumed


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


MIXES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=2, max_size=5)


def set_of(index: int, sizes: list[int]) -> int:
    return int(np.searchsorted(np.cumsum(sizes), index, side="right"))


@given(MIXES, st.integers(0, 3))
def test_each_set_has_its_share_of_every_prefix_to_within_one_question(mix, seed):
    sizes = [200 + size for size, _ in mix]  # no set is used up within a step
    weights = [weight for _, weight in mix]
    sampler = PromptSampler(sizes, 1, seed, weights=weights)
    counts = [0] * len(mix)
    for dealt in range(1, 60):
        counts[set_of(sampler.next_indices()[0], sizes)] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - dealt * weight / sum(weights)) <= 1


@given(MIXES, st.integers(0, 3), st.data())
def test_a_mixed_step_has_no_question_twice_and_resumes_as_if_never_stopped(mix, seed, data):
    sizes, weights = [size for size, _ in mix], [weight for _, weight in mix]
    per_step = data.draw(st.integers(1, sum(sizes)))
    whole = PromptSampler(sizes, per_step, seed, weights=weights)
    resumed = PromptSampler(sizes, per_step, seed, weights=weights)
    for _ in range(4):
        step = whole.next_indices()
        assert len(set(step)) == per_step
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert resumed.next_indices() == whole.next_indices()
    assert len({*step}) == per_step and max(step) < sum(sizes)


@given(MIXES, st.integers(0, 3), st.randoms(use_true_random=False), st.data())
def test_a_mix_deals_no_question_in_flight_and_resumes_as_if_never_stopped(mix, seed, random, data):
    sizes, weights = [size for size, _ in mix], [weight for _, weight in mix]
    per_step = data.draw(st.integers(1, sum(sizes)))
    whole = PromptSampler(sizes, per_step, seed, weights=weights)
    in_flight: list[int] = []
    dealt: list[list[int]] = [[] for _ in sizes]
    for _ in range(6):
        resumed = PromptSampler(sizes, per_step, seed, weights=weights)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        count = min(per_step, sum(sizes) - len(in_flight))
        step = whole.next_indices(count, excluded=in_flight)
        assert resumed.next_indices(count, excluded=in_flight) == step
        assert len({*step, *in_flight}) == len(step) + len(in_flight)
        for index in step:
            dealt[set_of(index, sizes)].append(index)
        in_flight = [index for index in [*in_flight, *step] if random.random() < 0.5]
    for size, of_set in zip(sizes, dealt, strict=True):
        assert len(set(of_set[:size])) == min(size, len(of_set)), "the first epoch deals each question once"


def test_a_question_in_flight_at_its_turn_is_dealt_later_in_the_same_epoch():
    sampler = PromptSampler(4, 1, seed=0)
    one, two, *_ = (sampler.next_indices()[0] for _ in range(4))
    for _ in range(2):  # the second epoch begins while two questions are in flight, which come last
        assert sampler.next_indices(excluded=[one, two])[0] not in (one, two)
    late, last = sorted((one, two), key=sampler._sets[0]._order.index)
    assert sampler.next_indices(excluded=[late]) == [last]
    assert (sampler.next_indices(), sampler.epoch) == ([late], 1)


def test_a_question_in_flight_until_the_end_of_an_epoch_is_left_out_of_this_epoch():
    sampler = PromptSampler(3, 1, seed=0)
    (held,) = sampler.next_indices()
    others = {0, 1, 2} - {held}
    for _ in range(3):
        assert {sampler.next_indices(excluded=[held])[0] for _ in others} == others
    assert sampler.epoch == 2
    assert sampler.next_indices() == [held]


def test_other_weights_after_a_resume_apply_at_once():
    begun = PromptSampler([1000, 1000], 100, seed=1, weights=[1, 1])
    for _ in range(5):
        begun.next_indices()
    resumed = PromptSampler([1000, 1000], 100, seed=1, weights=[9, 1])
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    for _ in range(3):
        assert sum(index < 1000 for index in resumed.next_indices()) == 90


def test_each_set_of_a_mix_goes_through_epochs_of_its_own():
    sampler = PromptSampler([2, 4], 3, seed=1, weights=[1, 2])
    stream = list(chain.from_iterable(sampler.next_indices() for _ in range(4)))
    first, second = [i for i in stream if i < 2], [i for i in stream if i >= 2]
    assert sorted(first[:2]) == sorted(first[2:]) == [0, 1]
    assert sorted(second[:4]) == sorted(second[4:]) == [2, 3, 4, 5]


def test_one_set_with_a_weight_keeps_the_order_of_a_recorded_run():
    sampler = PromptSampler([7], 3, 5, weights=[0.3])
    assert [sampler.next_indices() for _ in range(4)] == [[1, 4, 2], [3, 6, 5], [0, 4, 2], [6, 5, 3]]


def test_the_state_of_a_run_with_one_set_does_not_fit_a_mix():
    with pytest.raises(ConfigError, match=r"data\.train differs"):
        PromptSampler([3, 4], 2, 0, weights=[1, 1]).load_state_dict(PromptSampler(7, 2, 0).state_dict())
