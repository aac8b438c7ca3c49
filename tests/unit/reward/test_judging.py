"""Rewards that fail, hang, have bugs or return invalid values, without an engine."""

import math
import threading
from pathlib import Path

import pytest
from test_reward_files import RIGHT, episode_of

from a2tgpo.config.reward import RewardConfig
from a2tgpo.lifecycle.workers import HUNG_PER_WORKER
from a2tgpo.reward.episode import RewardError, Score
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.total import RewardFaultError, judge

SOON_S = 30.0
"""A test that waits for a thread fails after this many real seconds."""


class Reward:
    def __init__(self, score):
        self.score = score


def named(score, label: str = "mine", weight: float = 1.0) -> NamedReward:
    return NamedReward(label=label, weight=weight, reward=Reward(score), path=Path(__file__))


def test_parts_are_recorded_and_turn_scores_are_added_by_weight():
    called = "<think> a </think> <search> q </search>"
    episode = episode_of(called, called, called, RIGHT)
    one = named(lambda _: Score(value=1.0, parts={"style": 3}, turn_scores=[1.0, None, None]), "one")
    two = named(lambda _: Score(value=2, turn_scores=[0.5, 0.25, None]), "two", weight=2.0)
    three = named(lambda _: True, "three")
    verdict = judge([one, two, three], episode, format_gate=True)
    assert verdict.rewards == {"one": 1.0, "one.style": 3.0, "two": 2.0, "three": 1.0}
    assert (verdict.total, verdict.turn_scores) == (6.0, (2.0, 0.5, None))


def test_a_reward_of_weight_0_gives_no_turn_scores():
    episode = episode_of("<think> a </think> <search> q </search>", RIGHT)
    watched = named(lambda _: Score(value=1.0, turn_scores=[0.5]), "watched", weight=0.0)
    trained = named(lambda _: Score(value=1.0, turn_scores=[None]), "trained")
    alone = judge([watched], episode, format_gate=True)
    assert (alone.rewards, alone.total, alone.turn_scores) == ({"watched": 1.0}, 0.0, None)
    assert judge([watched, trained], episode, format_gate=True).turn_scores == (None,)


def fail(_):
    raise RewardError("no\nverdict")


def test_a_reward_without_a_verdict_names_itself_and_its_cause():
    verdict = judge([named(fail, "judge")], episode_of(RIGHT), format_gate=True)
    assert verdict.error == "judge: no verdict"


def leave(_):
    raise SystemExit(3)


def bug(episode):
    return episode.record["steps"]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (bug, r"^reward test_judging\.py:\d+ bug: KeyError: 'steps' \(question 'q17'\)$"),
        (
            lambda _: None,
            r"^reward test_judging\.py mine: it returned None, not a finite .* \(question 'q17'\)$",
        ),
        (lambda _: math.nan, r"mine: it returned nan, not a finite number"),
        (lambda _: "1", r"mine: it returned '1', not a finite number"),
        (lambda _: Score(value=1.0, parts={"a": math.inf}), r"it returned inf"),
        (lambda _: Score(value=1.0, turn_scores=[1.0]), r"1 turn_scores for 0 turns with tool calls"),
        (lambda _: 10**400, r"mine: it returned 10000.*, not a finite number or a Score with such parts"),
        (lambda _: {"value": 1.0}, r"mine: it returned \{'value': 1.0\}, not a finite number"),
        (lambda _: Score(value=1.0, parts=[1.0]), r"mine: it returned Score\(.*\), not a finite number or a"),
        (lambda _: Score(value=1.0, turn_scores=iter([1.0])), r"mine: it returned Score\(.*turn_scores"),
        (leave, r"^reward test_judging\.py:\d+ leave: SystemExit: 3$"),
    ],
)
def test_a_bug_in_a_reward_is_one_line_that_names_its_place(score, message):
    pool = RewardPool([named(score)], RewardConfig())
    pool.submit(episode_of(RIGHT, id="q17"))
    with pytest.raises(RewardFaultError, match=message) as error:
        pool.take(timeout_s=SOON_S)
    pool.close()
    assert "\n" not in str(error.value)


class Closing(Reward):
    """A user's reward with bugs in its optional methods."""

    def take_counts(self):
        return {"asked": "many"}

    def close(self):
        raise OSError("no licence")


def test_bugs_in_the_counts_and_the_end_of_a_reward_are_one_line(caplog):
    reward = NamedReward(label="mine", weight=1.0, reward=Closing(fail), path=Path(__file__))
    pool = RewardPool([reward], RewardConfig())
    with pytest.raises(RewardFaultError, match=r"^reward .*: TypeError: can only concatenate str"):
        pool.take_counts()
    pool.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("could not close the reward mine: test_judging.py:")
    assert record.getMessage().endswith("close: OSError: no licence")


def take_all(pool: RewardPool, count: int) -> dict:
    verdicts = {}
    while len(verdicts) < count:
        taken = pool.take(timeout_s=SOON_S)
        assert taken, "no verdict came"
        verdicts |= dict(taken)
    return verdicts


def test_verdicts_belong_to_their_episodes_in_whatever_order_they_come():
    second = threading.Event()

    def score(episode):
        if episode.question_id == "0":
            assert second.wait(SOON_S)
        else:
            second.set()
        return float(episode.question_id)

    pool = RewardPool([named(score)], RewardConfig())
    keys = [pool.submit(episode_of(RIGHT, id=str(number))) for number in range(5)]
    verdicts = take_all(pool, 5)
    pool.close()
    assert [verdicts[key].total for key in keys] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_hanging_reward_fails_at_its_deadline_and_leaves_all_workers():
    now, free, begun = [0.0], threading.Event(), threading.Semaphore(0)

    def score(episode):
        begun.release()
        if episode.question_id == "hangs":
            free.wait()
        return 1.0

    pool = RewardPool([named(score)], RewardConfig(num_workers=2, timeout_s=9.0), clock=lambda: now[0])
    hanging = [pool.submit(episode_of(RIGHT, id="hangs")) for _ in range(2)]
    assert all(begun.acquire(timeout=SOON_S) for _ in hanging)
    now[0] = 10.0
    late = take_all(pool, 2)
    assert [late[key].error for key in hanging] == ["mine: no verdict within 9 s (reward.timeout_s)"] * 2
    keys = [pool.submit(episode_of(RIGHT)) for _ in range(4)]
    verdicts = take_all(pool, 4)
    free.set()
    pool.close()
    assert [verdicts[key].total for key in keys] == [1.0] * 4


def test_too_many_hanging_rewards_end_the_run_with_one_line():
    now, free, begun = [0.0], threading.Event(), threading.Semaphore(0)

    def score(episode):
        begun.release()
        free.wait()
        return 1.0

    pool = RewardPool([named(score)], RewardConfig(num_workers=1, timeout_s=9.0), clock=lambda: now[0])
    with pytest.raises(RewardFaultError, match=r"5 reward calls, the latest of mine, .*more than 9 s"):
        for _ in range(HUNG_PER_WORKER + 1):
            pool.submit(episode_of(RIGHT))
            assert begun.acquire(timeout=SOON_S)
            now[0] += 10.0
            pool.take(timeout_s=0.0)
    free.set()
    pool.close()
