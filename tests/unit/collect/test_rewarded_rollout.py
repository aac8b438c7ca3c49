"""Rewards beside a rollout: who is judged, who is left out, and what ends the run; without an engine."""

import itertools
import threading
from pathlib import Path

import pytest
from scored import EM, prompt_of, tag_reader
from test_step_rollout import trajectory

from a2tgpo.batch.exchange import exchange
from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.collect.unjudged import require_verdicts, split
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.reward import RewardConfig
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.reward.episode import RewardError
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import RewardFaultError
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import Finished, RolloutInterruptedError
from a2tgpo.rollout.judging import Judging
from a2tgpo.trajectory import Turn

ANSWERS = ("Paris", "Rome", "Paris", "")
SOON_S = 30.0


class Played:
    """Stands in for `GroupRollout`: finishes a group's trajectories from the last sample to the first."""

    def play(self, prompts, *, seed, version, score_gain, queue, counts):
        for prompt, sample in itertools.product(prompts, reversed(range(len(ANSWERS)))):
            made = trajectory(prompt.index, sample)
            made.turns = [Turn(tokens=[1], rollout_logprobs=[0.0])]
            text = f"<think> a </think> <answer> \\boxed{{{ANSWERS[sample]}}} </answer>"
            yield Finished(trajectory=made, prompt=prompt, turn_texts=[text], context_logprobs=[])

    def finished(self, playing, *, should_stop):
        for done in playing:
            yield done
            if should_stop is not None and should_stop():
                raise RolloutInterruptedError


def named(score) -> NamedReward:
    reward = type("Reward", (), {"score": staticmethod(score)})()
    return NamedReward(label="mine", weight=1.0, reward=reward, path=Path(__file__))


def rewarded(rewards, *, should_stop=None, **settings) -> RewardedRollout:
    config = RewardConfig(**settings)
    reward = TrajectoryReward(reader=tag_reader(opening_tags=""), config=config)
    return RewardedRollout(Played(), reward, RewardPool(rewards, config), seed=0, should_stop=should_stop)


def play(rollout: RewardedRollout, num_prompts: int = 2):
    counts = RolloutCounts()
    prompts = [prompt_of(["Paris"], index=index) for index in range(num_prompts)]
    return rollout.play(prompts, version=0, counts=counts), counts


def test_each_trajectory_has_its_own_reward_in_the_order_of_prompts_and_samples():
    trajectories, counts = play(rewarded(EM))
    places = [(t.prompt_index, t.sample_index) for t in trajectories]
    assert places == list(itertools.product(range(2), range(4)))
    assert [t.outcome_reward for t in trajectories] == [1.0, 0.0, 1.0, 0.0] * 2
    assert [t.rewards for t in trajectories] == [{"em": t.outcome_reward} for t in trajectories]
    assert all(t.reward_error is None for t in trajectories) and counts.failed_rewards == 0


def no_rome(episode):
    if episode.answer == "Rome":
        raise RewardError("no verdict on Rome")
    return 1.0


def test_a_trajectory_without_a_verdict_is_kept_counted_and_left_out():
    trajectories, counts = play(rewarded([named(no_rome)]))
    errors = [t.reward_error for t in trajectories]
    assert errors == [None, "mine: no verdict on Rome", None, None] * 2
    judged, unjudged = split(trajectories)
    assert ([t.sample_index for t in judged], [t.sample_index for t in unjudged]) == ([0, 2, 3] * 2, [1, 1])
    assert counts.failed_rewards == 2


def bug(episode):
    return {"Paris": 1.0}[episode.answer]


@pytest.mark.parametrize("should_stop", [None, lambda: False])
def test_a_bug_of_a_reward_ends_the_rollout_with_its_line(should_stop):
    rollout = rewarded([named(bug)], should_stop=should_stop)
    with pytest.raises(RewardFaultError, match=r"^reward test_rewarded_rollout\.py:\d+ bug: KeyError: '.*'"):
        play(rollout)
    with pytest.raises(RewardFaultError):  # nothing of the failed rollout is left
        play(rollout, num_prompts=1)


class LatePool:
    """Stands in for `RewardPool`: gives `late` verdicts after the rollout."""

    def __init__(self, *late):
        self._late = list(late)

    def submit(self, episode):
        return episode

    def take(self, *, timeout_s):
        return [self._late.pop(0)] if timeout_s and self._late else []

    def drop_all(self):
        pass


def test_a_stop_request_does_not_discard_a_rollout_whose_last_verdict_has_come():
    judging = Judging(LatePool(("b", "good")), ALONE, should_stop=lambda: True)
    with judging:
        assert judging.judge("trajectory", "b") == []
        assert list(judging.rest()) == [("trajectory", "good")]
    judging = Judging(LatePool(("b", "good")), ALONE, should_stop=lambda: True)
    with pytest.raises(RolloutInterruptedError), judging:
        assert judging.judge("one", "a") == judging.judge("other", "b") == []
        list(judging.rest())


def test_a_stop_request_ends_the_wait_for_rewards():
    hangs, stops = threading.Event(), threading.Event()

    def hang(episode):
        stops.set()
        hangs.wait(SOON_S)
        return 1.0

    rollout = rewarded([named(hang)], should_stop=stops.is_set)
    with pytest.raises(RolloutInterruptedError):
        play(rollout, num_prompts=1)
    hangs.set()


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(), seed=0)
    shutdown()


def test_too_many_trajectories_without_a_verdict_end_the_run_with_the_last_cause(groups):
    trajectories, _ = play(rewarded([named(no_rome)]))
    require_verdicts(trajectories, max_share=0.25)
    require_verdicts([], max_share=0.0)
    message = (
        r"^rewards: 2 of 8 rollouts had no verdict \(reward.max_failed_share=0.2\); last: mine: no verdict on"
    )
    with pytest.raises(RewardFaultError, match=message):
        require_verdicts(trajectories, max_share=0.2)


def test_the_exchange_brings_trajectories_without_a_verdict_along(groups):
    trajectories, _ = play(rewarded([named(no_rome)]))
    judged, unjudged = split(exchange(trajectories, groups, prompts_per_minibatch=1))
    assert (len(judged), len(unjudged)) == (6, 2)
    assert all(t.reward_error == "mine: no verdict on Rome" for t in unjudged)
