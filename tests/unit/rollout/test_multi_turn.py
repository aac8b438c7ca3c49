"""Rollouts of the taught model, which has learnt the scripts of tiny_models by heart."""

import dataclasses
import threading

import pytest
import torch
from played import run, tags
from scripted_search import ScriptedSearch, toolset_of
from tiny_models import ANSWER, ASK, CAPITALS, prompt_ids, teach_more
from transformers import AutoModelForCausalLM

from a2tgpo.config.rollout import GainConfig
from a2tgpo.config.tools import CalculatorConfig
from a2tgpo.environment.tools.calculator import Calculator
from a2tgpo.io.errors import ConfigError
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout, RolloutInterruptedError
from a2tgpo.rollout.multi_turn import MIN_TURN_TOKENS
from a2tgpo.rollout.tool_pool import ToolFaultError
from a2tgpo.trajectory import Prompt

NO_THOUGHT_IS_OPEN = " <answer> \\boxed{"
"""The default scaffold for the contexts of these scripts, in which no thought is open."""


@pytest.fixture
def open_rollout(engine, engine_config, tokenizer):
    """Return a function that makes a rollout on the engine from a search and settings."""
    opened = []

    def open_rollout(
        search, *, limits=None, more_tools=None, end_of_turn=None, max_part_tokens=400, **settings
    ):
        config = dataclasses.replace(engine_config, **settings)
        protocol = tags(
            tokenizer, "search", *(more_tools or {}), gain=config.gain, max_part_tokens=max_part_tokens
        )
        if end_of_turn is not None:
            protocol.stop_tokens = (end_of_turn,)
        rollout = GroupRollout(
            engine,
            toolset_of(search, more_tools=more_tools, **(limits or {})),
            protocol,
            rollout=config,
        )
        opened.append(rollout)
        return rollout

    yield open_rollout
    for rollout in opened:
        rollout.close()


@pytest.fixture
def play(open_rollout, tokenizer):
    """Play questions. Return trajectories and counts."""

    def play(
        questions,
        search,
        *,
        greedy=True,
        gain=None,
        limits=None,
        more_tools=None,
        version=0,
        seed=0,
        **settings,
    ):
        run_settings = {name: settings.pop(name) for name in ("group_size", "score_gain") if name in settings}
        run_settings.setdefault("group_size", 1)
        gain = gain or GainConfig()
        rollout = open_rollout(search, limits=limits, more_tools=more_tools, gain=gain, **settings)
        prompts = [make_prompt(tokenizer, i, q) if isinstance(q, str) else q for i, q in enumerate(questions)]
        return run(
            rollout, prompts, seed=seed, version=version, greedy=greedy, measure=gain.measure, **run_settings
        )

    return play


def make_prompt(tokenizer, index, question, answers=None):
    country = question.removesuffix("?").rpartition(" ")[2]
    return Prompt(
        index=index,
        id=question,
        question=question,
        answers=answers or (CAPITALS.get(country, "none"),),
        tokens=tuple(prompt_ids(tokenizer, question)),
        hops=1,
    )


def texts(tokenizer, trajectory):
    return [tokenizer.decode(turn.tokens) for turn in trajectory.turns]


def sequence(trajectory):
    tokens = list(trajectory.prompt_tokens)
    for turn in trajectory.turns:
        tokens += turn.tokens + turn.observation_tokens
    return tokens


class ScoredSearch:
    """The search tool with a session for each trajectory, which scores the calls 1, 2, ..."""

    def __init__(self, search):
        self.search = search

    def open(self, record, question):
        return ScoredSession(self.search)

    def close(self):
        """Nothing is held."""


class ScoredSession:
    def __init__(self, search):
        self.search, self.num_calls = search, 0

    def call(self, text):
        self.num_calls += 1
        return [passage.text for passage in self.search.search(text)]

    def score(self):
        return self.num_calls

    def close(self):
        """Nothing is held."""


def test_the_score_of_a_session_becomes_that_of_the_turn(play, search):
    (scored,), _ = play(["ruler of Japan?"], search, more_tools={"search": ScoredSearch(search)})
    assert [turn.score for turn in scored.turns] == [1.0, 2.0, None]
    (plain,), _ = play(["ruler of Japan?"], search)
    assert [turn.score for turn in plain.turns] == [None, None, None]


def test_search_answers_come_back_as_observations_and_the_answer_is_rewarded(play, search, tokenizer):
    (one, two), counts = play(["capital of France?", "ruler of Japan?"], search)
    assert texts(tokenizer, one) == [ASK.format("capital of France"), ANSWER.format("Paris")]
    first = one.turns[0]
    assert first.query == "capital of France"
    expected = " <result>\nDoc 1 (Title: capital of France) capital of France is known.\n</result>"
    assert tokenizer.decode(first.observation_tokens) == expected
    assert first.observation_tokens.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert (one.stop_reason, one.outcome_reward, one.exact_match, one.format_ok) == ("answer", 1.0, 1.0, True)
    assert [turn.query for turn in two.turns] == ["capital of Japan", "ruler of Tokyo", None]
    assert (two.exact_match, two.format_ok, two.outcome_reward) == (0.0, True, 0.0)
    assert (len(one.turns), len(two.turns), counts.tool_calls) == (2, 3, 3)


def test_a_response_ends_with_the_token_that_the_template_ends_answers_with(open_rollout, search, tokenizer):
    """The tokenizer of a base model may name another token as the end of sequence."""
    prompts, how = [make_prompt(tokenizer, 0, "silent?")], dict(seed=0, version=0, greedy=True, group_size=1)
    (whole,), _ = run(open_rollout(search), prompts, **how)
    tokens = list(whole.turns[0].tokens)
    end = next(i for i in reversed(range(len(tokens) - 1)) if tokens[i] not in tokens[:i])
    rollout = open_rollout(search, end_of_turn=tokens[end])
    (ended,), _ = run(rollout, prompts, **how)
    assert [list(turn.tokens) for turn in ended.turns] == [tokens[: end + 1]], (
        "it is sampled, so it is trained on"
    )
    assert ended.stop_reason == "eos"
    assert rollout.turn_texts(ended) == [tokenizer.decode(tokens[:end])]


def test_tokens_are_those_of_the_engine_and_nothing_is_encoded_again(play, search, reference, tokenizer):
    trajectories, _ = play(["capital of Italy?", "ruler of France?"], search, greedy=False, group_size=4)
    for trajectory in trajectories:
        expected = reference(sequence(trajectory), num_ids=len(tokenizer))
        position = len(trajectory.prompt_tokens)
        for turn in trajectory.turns:
            end = position + len(turn.tokens)
            assert turn.rollout_logprobs == pytest.approx(expected[position - 1 : end - 1], abs=1e-4)
            position = end + len(turn.observation_tokens)


def test_seeds_make_rollouts_repeatable_whatever_is_played_beside_them(play, search, tokenizer):
    questions = ["capital of France?", "capital of Peru?", "ruler of Italy?"]
    prompts = [make_prompt(tokenizer, i, q) for i, q in enumerate(questions)]
    settings = dict(greedy=False, group_size=3, score_gain=False, temperature=2.0, max_turn_tokens=48)

    def played(prompts, **more):
        trajectories, _ = play(prompts, search, **{**settings, **more})
        return {(t.prompt_id, t.sample_index): sequence(t) for t in trajectories}

    together = played(prompts)
    assert len({tuple(tokens) for tokens in together.values()}) > 5, "at this temperature samples differ"
    assert played(prompts[::-1]) == together
    alone = {key: value for prompt in prompts for key, value in played([prompt]).items()}
    assert alone == together
    assert played(prompts, score_gain=True) == together
    assert played(prompts, version=1) != together
    assert played(prompts, seed=1) != together


def test_gain_is_the_answers_probability_after_minus_before(play, search, tokenizer, reference):
    (trajectory,), counts = play(["ruler of Japan?"], search)
    scaffold = tokenizer(NO_THOUGHT_IS_OPEN, add_special_tokens=False)["input_ids"]
    answer = tokenizer("Tokyo", add_special_tokens=False)["input_ids"]

    def probability(context):
        logprobs = reference(context + scaffold + answer)[-len(answer) :]
        return 2.718281828459045 ** (sum(logprobs) / len(logprobs))

    context = list(trajectory.prompt_tokens)
    expected = [probability(context)]
    for turn in trajectory.turns[:-1]:
        context += turn.tokens + turn.observation_tokens
        expected.append(probability(context))
    assert trajectory.baseline_prob == pytest.approx(expected[0], rel=1e-3)
    assert [turn.answer_prob for turn in trajectory.turns] == [
        *(pytest.approx(p, rel=1e-3) for p in expected[1:]),
        None,
    ]
    gains = [turn.info_gain for turn in trajectory.turns]
    assert gains[0] == pytest.approx(expected[1] - expected[0], abs=1e-5)
    assert gains[1] == pytest.approx(expected[2] - expected[1], abs=1e-5)
    assert gains[2] is None
    assert counts.scored_tokens == 3 * len(answer)


def test_baseline_is_scored_once_per_prompt(play, search, tokenizer):
    trajectories, counts = play(["capital of France?", "capital of Spain?"], search, group_size=3)
    answers = [
        tokenizer(CAPITALS[land], add_special_tokens=False)["input_ids"] for land in ("France", "Spain")
    ]
    assert counts.scored_tokens == sum((1 + 3) * len(answer) for answer in answers)
    assert len({t.baseline_prob for t in trajectories}) == 2


def test_the_best_alias_counts_where_the_reduction_is_max(play, search, tokenizer):
    aliases = ("Rome", "Paris", "Rome", "Tokyo")
    prompt = make_prompt(tokenizer, 0, "capital of France?", aliases)
    each = [
        play([make_prompt(tokenizer, 0, "capital of France?", (alias,))], search)[0][0].turns[0].answer_prob
        for alias in ("Rome", "Paris", "Tokyo")
    ]
    (best,), counts = play([prompt], search, gain=GainConfig(answer_reduction="max"))
    assert best.turns[0].answer_prob == pytest.approx(max(each), rel=1e-4)
    assert counts.scored_tokens == 2 * sum(
        len(tokenizer(alias, add_special_tokens=False)["input_ids"]) for alias in ("Rome", "Paris", "Tokyo")
    )
    (first,), _ = play([prompt], search, gain=GainConfig(answer_reduction="first"))
    assert first.turns[0].answer_prob == pytest.approx(each[0], rel=1e-4)


def test_an_answer_without_room_leaves_the_gain_empty_and_is_counted(play, search, tokenizer):
    prompt = make_prompt(tokenizer, 0, "capital of France?", ("Paris " * 1100,))
    (trajectory,), counts = play([prompt], search)
    assert (trajectory.baseline_prob, trajectory.turns[0].answer_prob, trajectory.turns[0].info_gain) == (
        None,
    ) * 3
    assert counts.scored_tokens == 0
    assert trajectory.stop_reason == "answer"


@pytest.mark.parametrize(
    ("question", "settings", "stop_reason", "queries"),
    [
        ("loop?", dict(max_turns=2), "max_turns", ["again", "again", None]),
        ("empty?", {}, "empty_query", [None]),
        ("unopened?", {}, "empty_query", [None]),
        ("nested?", {}, "answer", ["two", None]),
        ("silent?", {}, "eos", [None]),
        ("babble?", dict(max_turn_tokens=20), "length", [None]),
        ("babble?", dict(max_response_tokens=30), "length", [None]),
    ],
)
def test_stop_reasons(play, search, question, settings, stop_reason, queries):
    (trajectory,), counts = play([question], search, **settings)
    assert trajectory.stop_reason == stop_reason
    assert [turn.query for turn in trajectory.turns] == queries
    assert not trajectory.turns[-1].observation_tokens
    assert counts.empty_queries == (stop_reason == "empty_query")
    assert trajectory.outcome_reward == -1.0


def test_budgets_hold_exactly(play, search):
    (trajectory,), _ = play(["babble?"], search, max_turn_tokens=20)
    assert trajectory.num_sampled_tokens == 20
    (trajectory,), _ = play(["babble?"], search, max_response_tokens=30)
    assert trajectory.num_sampled_tokens == 30


def test_the_engines_longest_sequence_ends_a_rollout(play, search, tokenizer, engine):
    prompt = make_prompt(tokenizer, 0, "babble?")
    filler = list(prompt.tokens[-1:]) * (engine.max_model_len - 40)
    prompt = dataclasses.replace(prompt, tokens=(*filler, *prompt.tokens))
    (trajectory,), _ = play([prompt], search, max_turn_tokens=4000)
    if trajectory.stop_reason != "eos":
        assert trajectory.stop_reason == "context"
        assert trajectory.num_tokens == engine.max_model_len


def test_a_long_observation_is_cut_to_the_budget_and_still_closed(play, tokenizer):
    search = ScriptedSearch(text="la " * 300)
    (full,), _ = play(["capital of France?"], search, max_turn_tokens=40)
    num_asked = len(full.turns[0].tokens)
    budget = num_asked + 100
    (trajectory,), counts = play(
        ["capital of France?"], search, max_turn_tokens=40, max_response_tokens=budget
    )
    observation = trajectory.turns[0].observation_tokens
    assert len(observation) == budget - num_asked - MIN_TURN_TOKENS
    assert tokenizer.decode(observation).endswith("\n</result>")
    assert counts.truncated_observations == 1
    assert trajectory.num_tokens - len(trajectory.prompt_tokens) <= budget


def test_a_call_without_room_for_an_answer_ends_the_rollout(play, search):
    (full,), _ = play(["capital of France?"], search)
    budget = len(full.turns[0].tokens) + MIN_TURN_TOKENS
    searched = len(search.queries)
    (trajectory,), counts = play(["capital of France?"], search, max_response_tokens=budget)
    assert (trajectory.stop_reason, trajectory.num_process_turns, counts.tool_calls) == ("length", 0, 0)
    assert len(search.queries) == searched


def test_passages_are_cut_by_tokens(play, tokenizer):
    search = ScriptedSearch(text="la " * 300)
    (trajectory,), _ = play(["capital of France?"], search, max_part_tokens=40, max_turn_tokens=40)
    frame = len(tokenizer(" <result>\n")["input_ids"]) + len(tokenizer("\n</result>")["input_ids"])
    assert 38 <= len(trajectory.turns[0].observation_tokens) - frame <= 42


def test_a_failed_search_is_told_to_the_policy_and_counted(play, tokenizer):
    search = ScriptedSearch(failing=["capital of France"])
    (failed, fine), counts = play(["capital of France?", "capital of Peru?"], search)
    assert failed.turns[0].tool_failed
    told = tokenizer.decode(failed.turns[0].observation_tokens)
    assert told == " <result>\nThe search failed: no route to capital of France\n</result>"
    assert failed.turns[0].info_gain is not None
    assert not fine.turns[0].tool_failed
    assert (counts.failed_calls, counts.tool_calls) == (1, 2)


def test_a_search_that_never_answers_fails_at_its_deadline(play):
    class Hanging(ScriptedSearch):
        def search(self, query):
            assert freed.wait(60)
            return super().search(query)

    freed = threading.Event()
    (trajectory,), counts = play(["capital of France?"], Hanging(), limits={"call_timeout_s": 0.2})
    freed.set()
    assert trajectory.turns[0].tool_failed
    assert (counts.failed_calls, counts.hung_calls) == (1, 1)


def test_a_rollout_that_ends_early_leaves_nothing_behind_and_the_next_one_plays_anew(
    open_rollout, search, tokenizer, engine
):
    """The rollout is first interrupted, and then stopped by a tool's bug, while some trajectories generate and one
    waits for a tool.
    """

    class Held(ScriptedSearch):
        def search(self, query):
            if query == "capital of France" and not freed.is_set():
                asked.set()
                assert freed.wait(60)
            if has_bug.is_set():
                raise KeyError("a bug")
            return super().search(query)

    asked, freed, has_bug = threading.Event(), threading.Event(), threading.Event()
    prompts = [make_prompt(tokenizer, i, q) for i, q in enumerate(["capital of France?", "babble?", "loop?"])]
    settings = dict(seed=0, version=0, group_size=2)
    expected = [sequence(t) for t in run(open_rollout(search), prompts, **settings)[0]]
    rollout = open_rollout(Held())
    with pytest.raises(RolloutInterruptedError):
        run(rollout, prompts, should_stop=asked.is_set, **settings)
    assert not engine.has_unfinished
    freed.set()
    assert [sequence(t) for t in run(rollout, prompts, **settings)[0]] == expected
    has_bug.set()
    with pytest.raises(
        ToolFaultError, match=r"^the search tool failed with KeyError: 'a bug' at test_multi_turn\.py"
    ):
        run(rollout, prompts, **settings)
    assert not engine.has_unfinished
    has_bug.clear()
    assert [sequence(t) for t in run(rollout, prompts, **settings)[0]] == expected


def test_a_rollout_is_broken_off_while_all_trajectories_wait_for_their_tools(open_rollout, tokenizer):
    class Hanging(ScriptedSearch):
        def search(self, query):
            asked.set()
            assert freed.wait(60)
            return super().search(query)

    asked, freed = threading.Event(), threading.Event()
    with pytest.raises(RolloutInterruptedError):
        run(
            open_rollout(Hanging()),
            [make_prompt(tokenizer, 0, "capital of France?")],
            seed=0,
            version=0,
            group_size=1,
            should_stop=asked.is_set,
        )
    assert not freed.is_set()
    freed.set()


def test_others_go_on_while_a_search_is_slow(open_rollout, tokenizer):
    """The slow search ends when the other trajectories have finished."""
    slow, others_finished = "capital of France?", threading.Event()

    class Slow(ScriptedSearch):
        def search(self, query):
            assert query != slow.removesuffix("?") or others_finished.wait(60)
            return super().search(query)

    questions = [slow, "ruler of Japan?", "ruler of Italy?", "capital of Peru?"]
    prompts = [make_prompt(tokenizer, i, q) for i, q in enumerate(questions)]
    rollout, finished, counts = open_rollout(Slow()), [], RolloutCounts()
    playing = rollout.play(prompts, seed=0, version=0, greedy=True, group_size=1, counts=counts)
    for done in rollout.finished(playing):
        finished.append(done.prompt.id)
        if len(finished) == 3:
            others_finished.set()
    assert finished[3:] == [slow] and sorted(finished) == sorted(questions)
    assert counts.tool_wait_s > 0


def test_searches_run_beside_each_other(play):
    """Each search ends when all have started."""

    class Meeting(ScriptedSearch):
        def search(self, query):
            all_begun.wait(60)
            return super().search(query)

    all_begun = threading.Barrier(len(CAPITALS))
    played, counts = play([f"capital of {country}?" for country in CAPITALS], Meeting())
    assert {trajectory.stop_reason for trajectory in played} == {"answer"} and counts.tool_wait_s > 0


def test_earlier_turns_are_taken_from_the_cache(play, search, engine):
    engine_block = 32
    trajectories, counts = play(["ruler of Japan?", "ruler of Italy?"], search)
    recomputed = counts.known_prefix_tokens - counts.cached_prefix_tokens
    returning_turns = sum(len(t.turns) - 1 for t in trajectories)
    assert counts.cached_prefix_tokens > 0
    assert recomputed < returning_turns * (engine_block + 1), "less than the unfilled block of every turn"


def test_questions_with_most_hops_start_first_and_come_back_in_their_places(
    play, search, tokenizer, engine, monkeypatch
):
    questions = ["capital of France?", "ruler of Japan?", "capital of Peru?"]
    prompts = [
        dataclasses.replace(make_prompt(tokenizer, i, question), hops=hops)
        for i, (question, hops) in enumerate(zip(questions, (0, 3, 1), strict=True))
    ]
    submit, started = engine.submit, []

    def recording(request_id, tokens, **options):
        started.append(tuple(tokens))
        submit(request_id, tokens, **options)

    monkeypatch.setattr(engine, "submit", recording)
    trajectories, _ = play(prompts, search)
    assert started[:3] == [prompts[i].tokens for i in (1, 2, 0)]
    assert [t.prompt_id for t in trajectories] == questions


def test_no_prompts_give_no_trajectories(play, search):
    trajectories, counts = play([], search)
    assert (trajectories, counts.sampled_tokens) == ([], 0)


def test_a_prompt_past_the_engines_length_is_refused(play, search, tokenizer):
    prompt = dataclasses.replace(make_prompt(tokenizer, 0, "loop?"), tokens=(5,) * 1100)
    with pytest.raises(
        ConfigError, match=r"^length of the prompt of question 'loop\?' is 1100; allowed: < 1024"
    ):
        play([prompt], search)


@pytest.fixture
def calculating(engine, taught_path):
    """The engine has a model that also uses a calculator; the old weights are restored afterwards."""
    call = "<think> I need a fact. </think> <calculator> 6 * 7 </calculator>"
    turns = [call, ANSWER.format("42")]
    model = teach_more(taught_path, "6 times 7?", turns, " <result>\n42\n</result>")
    old = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32)
    engine.load_weights(model.state_dict().items(), version=1)
    yield
    engine.load_weights(old.state_dict().items(), version=0)


def test_another_tool_is_called_by_its_own_tag_and_its_answer_brings_a_gain(
    play, search, tokenizer, calculating
):
    tools = {"calculator": Calculator(CalculatorConfig())}
    question = make_prompt(tokenizer, 0, "6 times 7?", ("42",))
    (one,), counts = play([question], search, more_tools=tools)
    first = one.turns[0]
    assert (first.tool, first.query, first.tool_failed) == ("calculator", "6 * 7", False)
    assert tokenizer.decode(first.observation_tokens) == " <result>\n42\n</result>"
    assert first.info_gain == pytest.approx(first.answer_prob - one.baseline_prob)
    assert (one.outcome_reward, one.format_ok) == (1.0, True)
    assert counts.tool_calls == 1 and not search.queries
    # Without the tool its tags are text, so they do not end the turn.
    (alone,), _ = play([question], search)
    assert alone.num_process_turns == 0 and "</calculator>" in tokenizer.decode(alone.turns[0].tokens)


def test_a_question_in_a_script_without_spaces_is_searched_and_answered(
    play, search, tokenizer, engine, taught_path
):
    """Every character has three tokens here, and the policy's query contains an ideographic space."""
    turns = ["<think> 検索 </think> <search> 日本の\u3000首都 </search>", ANSWER.format("東京")]
    observation = " <result>\nDoc 1 (Title: 日本の 首都) 日本の 首都 is known.\n</result>"
    model = teach_more(taught_path, "日本の首都?", turns, observation)
    old = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32)
    engine.load_weights(model.state_dict().items(), version=1)
    try:
        (one,), _ = play([make_prompt(tokenizer, 0, "日本の首都?", ("東京",))], search)
    finally:
        engine.load_weights(old.state_dict().items(), version=0)
    assert search.queries == ["日本の 首都"] and one.turns[0].query == "日本の 首都"
    assert texts(tokenizer, one) == turns
    assert tokenizer.decode(one.turns[0].observation_tokens) == observation
    assert (one.outcome_reward, one.exact_match, one.format_ok) == (1.0, 1.0, True)
