"""Greedy evaluation of the taught model, and scores compared with numbers computed by hand."""

import dataclasses
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
from played import tags
from rendered_sets import rendered_sets
from scored import EM, score, tag_reader
from scripted_search import ScriptedSearch, toolset_of
from taught import taught_folder
from tiny_models import prompt_ids
from transformers import AutoTokenizer

from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.evaluate.evaluate import answer_questions, evaluate
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.reward.episode import RewardError, Score
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Call, Prompt, Trajectory, Turn

QUESTIONS = [  # question, answers, hops
    ("capital of France?", ("Paris",), 1),
    ("capital of Japan?", ("Edo", "Tokyo"), 1),
    ("ruler of Italy?", ("King of Rome",), 2),
    ("ruler of Japan?", ("Queen of Tokyo",), 2),
    ("empty?", ("nothing",), 1),
]


@pytest.fixture(scope="module")
def rollout():
    from a2tgpo.rollout.vllm_engine import VllmEngine

    path = taught_folder()
    config = RolloutConfig(kv_cache_gib=0.1, max_concurrent=8, dtype="float32")
    engine = VllmEngine(path, config=config, model_dtype="float32", max_model_len=512, seed=0)
    rollout = GroupRollout(
        engine,
        toolset_of(ScriptedSearch()),
        tags(AutoTokenizer.from_pretrained(path)),
        rollout=config,
    )
    yield rollout
    rollout.close()
    engine.close()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(taught_folder())
    return [
        Prompt(index=i, id=str(i), question=q, answers=a, hops=h, tokens=tuple(prompt_ids(tokenizer, q)))
        for i, (q, a, h) in enumerate(QUESTIONS)
    ]


def test_metrics_over_all_questions(rollout, prompts):
    metrics = evaluate(rollout, rendered_sets(test=prompts))
    assert metrics["num_questions"] == 5
    assert metrics["em"] == metrics["em_format_gated"] == pytest.approx(3 / 5)
    assert metrics["em_1_hops"] == pytest.approx(2 / 3)
    assert metrics["em_2_hops"] == pytest.approx(1 / 2)
    assert metrics["f1"] == pytest.approx((3 + 2 / 3) / 5)
    assert metrics["standard_error_em"] == pytest.approx(math.sqrt(3 / 5 * 2 / 5 / 5))
    assert metrics["standard_error_f1"] == pytest.approx(
        statistics.pstdev([1, 1, 1, 2 / 3, 0]) / math.sqrt(5)
    )
    assert metrics["format_ok_rate"] == pytest.approx(4 / 5)
    assert metrics["tool_calls"] == pytest.approx((1 + 1 + 2 + 2 + 0) / 5)


def test_an_engine_plays_its_share_and_none_where_that_is_empty(rollout, prompts):
    share = EngineGroup(index=1, count=2)
    assert evaluate(rollout, rendered_sets(test=prompts), share)["num_questions"] == 2
    assert evaluate(rollout, rendered_sets(test=prompts[:1]), share) == {"num_questions": 0.0}


def test_several_sets_are_scored_together_and_each_by_itself(rollout, prompts):
    alone = evaluate(rollout, rendered_sets(test=prompts))
    hard = [dataclasses.replace(prompt, id=str(place)) for place, prompt in enumerate(prompts[2:])]
    parts = {"easy": prompts[:2], "hard": hard}  # with equal ids
    metrics = evaluate(rollout, rendered_sets(**parts))
    assert {name: metrics[name] for name in alone} == alone
    for name, of_set in parts.items():
        expected = evaluate(rollout, rendered_sets(test=of_set))
        assert {key: metrics[f"{name}/{key}"] for key in expected} == expected
    assert metrics["easy/em"] == 1 and metrics["hard/num_questions"] == 3


def test_samples_give_mean_at_k_and_pass_at_k_beside_the_greedy_scores(rollout, prompts):
    metrics = evaluate(rollout, rendered_sets(test=prompts), num_samples=4, seed=5)
    greedy = evaluate(rollout, rendered_sets(test=prompts))
    assert {name: metrics[name] for name in greedy} == greedy
    answers = list(answer_questions(rollout, prompts, num_samples=4, seed=5))
    right = Counter(answer.question_id for answer in answers if answer.exact_match)
    assert metrics["mean_at_4"] == pytest.approx(sum(right.values()) / 20)
    assert metrics["pass_at_4"] == pytest.approx(len(right) / 5)
    pairs = [1 - math.comb(4 - right[prompt.id], 2) / 6 for prompt in prompts]
    assert metrics["pass_at_2"] == pytest.approx(statistics.mean(pairs))
    assert metrics["standard_error_pass_at_2"] == pytest.approx(statistics.pstdev(pairs) / math.sqrt(5))


def test_an_engines_further_ranks_count_nothing(rollout, prompts):
    assert evaluate(rollout, rendered_sets(test=prompts[:2]), EngineGroup(rank=1)) == {"num_questions": 0.0}


class Calls:
    """A reward of a tenth per tool call, without a verdict on questions about Italy. It distinguishes evaluations
    from training steps.
    """

    def score(self, episode):
        assert episode.is_evaluation
        if "Italy" in episode.question:
            raise RewardError("no verdict on Italy")
        return Score(value=sum(len(turn.calls) for turn in episode.turns) / 10, parts={"one": 1})


def test_rewards_of_the_run_are_further_scores_of_the_answers_that_they_judged(rollout, prompts):
    calls = NamedReward(label="calls", weight=2.0, reward=Calls(), path=Path(__file__))
    pool = RewardPool([*EM, calls], RewardConfig())
    sets = rendered_sets(test=prompts)
    plain, metrics = evaluate(rollout, sets), evaluate(rollout, sets, rewards=pool)
    assert metrics | plain == metrics
    judged = [0.1, 0.1, 0.2, 0.0]
    assert metrics["calls"] == pytest.approx(sum(judged) / 4) and metrics["calls.one"] == 1
    assert metrics["standard_error_calls"] == pytest.approx(statistics.pstdev(judged) / math.sqrt(4))
    totals = [1 + 0.2, 1 + 0.2, 0.4, -1.0]  # the last response has a wrong format
    assert metrics["reward"] == pytest.approx(sum(totals) / 4)
    answers = list(answer_questions(rollout, prompts, rewards=pool))
    pool.close()
    (unjudged,) = (answer for answer in answers if answer.reward_error is not None)
    assert "Italy" in unjudged.question and unjudged.scores == {}
    assert unjudged.reward_error == "calls: no verdict on Italy"
    assert metrics["num_unjudged"] == 1 and "num_unjudged" not in plain


def test_an_answer_that_exists_is_not_played_again(rollout, prompts):
    def play(**settings):
        answers = answer_questions(rollout, prompts, num_samples=3, seed=5, **settings)
        return sorted(answers, key=lambda answer: (answer.question_id, answer.sample_index))

    answers, skip = play(), {(0, 1), (3, 0), (3, 1), (3, 2)}
    assert len(answers) == 15
    assert play(skip=skip) == [a for a in answers if (int(a.question_id), a.sample_index) not in skip]


def trajectory_of(num_process_turns):
    turns = [
        Turn(
            tokens=[1],
            rollout_logprobs=[0.0],
            observation_tokens=[2],
            calls=[Call(tool="search", arguments="q")],
        )
        for _ in range(num_process_turns)
    ]
    turns.append(Turn(tokens=[3], rollout_logprobs=[0.0]))
    return Trajectory(
        prompt_index=0, prompt_id="0", sample_index=0, prompt_tokens=[1], turns=turns, stop_reason="answer"
    )


SEARCHED = "<think> a </think> <search> b </search>"
ANSWERED = "<answer> \\boxed{Paris} </answer>"


def test_gains_and_reward_are_filled_in():
    trajectory = trajectory_of(2)
    logprobs = [[[-2.0, -4.0]], [[-1.0, -1.0]], [[0.0, -1.0]]]
    reward = TrajectoryReward(reader=tag_reader())
    score(reward, trajectory, [SEARCHED, SEARCHED, ANSWERED], ["paris"], logprobs)
    assert (trajectory.outcome_reward, trajectory.exact_match, trajectory.format_ok) == (1.0, 1.0, True)
    assert trajectory.baseline_prob == pytest.approx(math.exp(-3))
    assert [turn.answer_prob for turn in trajectory.turns] == [
        pytest.approx(math.exp(-1)),
        pytest.approx(math.exp(-0.5)),
        None,
    ]
    assert trajectory.turns[0].info_gain == pytest.approx(math.exp(-1) - math.exp(-3))
    assert trajectory.turns[1].info_gain == pytest.approx(math.exp(-0.5) - math.exp(-1))
    assert trajectory.turns[2].info_gain is None


def test_a_missing_score_leaves_its_two_gains_empty_and_shifts_none():
    trajectory = trajectory_of(3)
    logprobs = [[[-3.0]], None, [[-2.0]], [[-1.0]]]
    reward = TrajectoryReward(reader=tag_reader(), measure="log_probability")
    score(reward, trajectory, [SEARCHED] * 3 + [ANSWERED], ["Rome"], logprobs)
    assert [turn.info_gain for turn in trajectory.turns] == [None, None, 1.0, None]
    assert trajectory.turns[0].answer_prob is None


def test_a_length_penalty_counts_observations_and_changes_the_reward_alone():
    trajectory = trajectory_of(2)  # 2 x (1 sampled + 1 observed) + 1 sampled, without the prompt's token
    overlong = RewardConfig(overlong_buffer_tokens=4, overlong_penalty=0.5)
    reward = TrajectoryReward(reader=tag_reader(), config=overlong, max_response_tokens=7)
    score(reward, trajectory, [SEARCHED, SEARCHED, ANSWERED], ["paris"])
    assert (trajectory.outcome_reward, trajectory.exact_match, trajectory.format_ok) == (0.75, 1.0, True)


@pytest.mark.parametrize(
    ("opening_tags", "first", "last", "format_ok"),
    [
        ("", SEARCHED, ANSWERED, True),
        ("", SEARCHED.removeprefix("<think>"), ANSWERED, False),
        ("<think>", SEARCHED.removeprefix("<think>"), ANSWERED, True),
        ("<think>", SEARCHED.removeprefix("<think>"), f"<think> now </think> {ANSWERED}", True),
        ("<think>", SEARCHED, ANSWERED, False),
        ("<think>", "<search> b </search>", f"a </think> {ANSWERED}", True),
        ("<think></think>", "<search> b </search>", ANSWERED, True),
        ("", "<search> b </search>", ANSWERED, False),
        (None, SEARCHED.removeprefix("<think>"), ANSWERED, True),
        (None, SEARCHED, ANSWERED, True),
        (None, "<search> b </search>", ANSWERED, False),
    ],
)
def test_a_thought_that_the_prompt_opens_counts_for_the_format(opening_tags, first, last, format_ok):
    trajectory = trajectory_of(1)
    reward = TrajectoryReward(reader=tag_reader(opening_tags=opening_tags))
    score(reward, trajectory, [first, last], ["Paris"])
    assert (trajectory.format_ok, trajectory.exact_match) == (format_ok, 1.0)
    assert trajectory.outcome_reward == (1.0 if format_ok else -1.0)


def test_an_unanswered_search_is_a_format_error():
    trajectory = trajectory_of(0)
    score(TrajectoryReward(reader=tag_reader()), trajectory, [SEARCHED], ["Paris"])
    assert (trajectory.outcome_reward, trajectory.format_ok) == (-1.0, False)
    assert trajectory.baseline_prob is None
