"""Trajectories that continue in a later step, played by a real engine with the taught model."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from played import rewarded, run, run_on, tags
from scripted_search import toolset_of
from tiny_models import CAPITALS, prompt_ids
from transformers import AutoModelForCausalLM

from a2tgpo.batch.packing import packed_length
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import StepRollout
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.environment.tool import Toolset
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.rollout.multi_turn import LiveTrajectory, PromptGroup, Sampling
from a2tgpo.trajectory import Prompt, Trajectory

NO_THOUGHT_IS_OPEN = " <answer> \\boxed{"
"""The default scaffold for the contexts of these scripts, in which no thought is open."""

QUESTIONS = [
    "ruler of Japan?",
    "capital of Peru?",
    "loop?",
    "ruler of Italy?",
    "babble?",
    "capital of France?",
]
ENDLESS = 10**9


@pytest.fixture
def rollout(engine, engine_config, tokenizer, search):
    config = dataclasses.replace(
        engine_config, group_size=2, max_turns=3, max_turn_tokens=48, temperature=1.0
    )
    made = GroupRollout(
        engine,
        toolset_of(search),
        tags(tokenizer, gain=config.gain),
        rollout=config,
    )
    yield made
    made.close()


@pytest.fixture
def prompts_of(tokenizer):
    def prompts_of(indices, positions=None):
        return [
            Prompt(
                index=place,
                id=f"{index}: {question}",
                question=question,
                answers=(CAPITALS.get(question.removesuffix("?").rpartition(" ")[2], "none"),),
                tokens=tuple(prompt_ids(tokenizer, question)),
            )
            for place, index in enumerate(indices)
            for question in [QUESTIONS[index % len(QUESTIONS)]]
            if positions is None or place in positions
        ]

    return prompts_of


@pytest.fixture
def begin(prompts_of):
    def begin(*indices, step=0):
        return [
            CarriedGroup(begun=step, question=index, prompt=prompt)
            for index, prompt in zip(indices, prompts_of(indices), strict=True)
        ]

    return begin


@pytest.fixture
def other_weights(engine, taught_path):
    """Return a function that loads slightly different weights into the engine and returns their log-prob function.
    The old weights are restored afterwards.
    """
    model = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32).eval()
    old = copy.deepcopy(model.state_dict())

    def logprobs(tokens, *, num_ids=None):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :, :num_ids].log_softmax(-1)
        return logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    def change():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
        engine.load_weights(model.state_dict().items(), version=1)
        return logprobs

    yield change
    engine.load_weights(old.items(), version=0)


def members(groups):
    return [trajectory for group in groups for trajectory in group.trajectories]


def as_dicts(trajectories):
    return [trajectory.to_dict() for trajectory in trajectories]


def assert_alike(found, expected):
    """Compare without the rounding errors of log-probs and probabilities.

    Rounding depends on what the engine computes in the same pass, and therefore on when tools answer.
    """
    floats, expected_floats = [], []
    assert without_floats(found, floats) == without_floats(expected, expected_floats)
    assert floats == pytest.approx(expected_floats, abs=1e-4)


def without_floats(value, floats):
    """Return `value` with every float replaced by None, and append the floats to `floats`."""
    if isinstance(value, float):
        floats.append(value)
        return None
    if isinstance(value, dict):
        return {key: without_floats(item, floats) for key, item in value.items()}
    if isinstance(value, list):
        return [without_floats(item, floats) for item in value]
    return value


def play_out(rollout, groups, *, budget, step=0, calls=9):
    """Play groups to the end with as many calls in one step as needed. Return them and the counts of each call."""
    counted = []
    while not all(group.is_complete for group in groups):
        unfinished = [group for group in groups if not group.is_complete]
        played, counts = run_on(rollout, unfinished, budgets=[budget] * len(unfinished), version=step)
        counted.append(counts)
        by_key = {group.key: group for group in played}
        groups = [by_key.get(group.key, group) for group in groups]
        assert len(counted) <= calls
    return groups, counted


def test_without_a_budget_it_is_the_rollout_of_a_whole_step(rollout, begin, prompts_of):
    expected, counts = run(rollout, prompts_of(range(6)), version=4)
    for budgets in ([None] * 6, [ENDLESS] * 6):
        played, counted = run_on(rollout, begin(*range(6), step=4), budgets=budgets, version=4)
        assert_alike(as_dicts(members(played)), as_dicts(expected))
        assert {turn.version for trajectory in members(played) for turn in trajectory.turns} == {4}
        assert counted.sampled_tokens == counts.sampled_tokens


@pytest.mark.parametrize("budget", [1, 10, 20])
def test_no_turn_begins_once_the_budget_is_used_up(rollout, begin, budget):
    groups = begin(*range(6))
    played, _ = run_on(rollout, groups, budgets=[budget] * 6, version=0)
    assert any(not trajectory.stop_reason for trajectory in members(played)), "none was cut"
    for trajectory in members(played):
        assert sum(len(turn.tokens) for turn in trajectory.turns[:-1]) < budget
        if not trajectory.stop_reason:
            assert trajectory.num_sampled_tokens >= budget, "cut before its budget was used up"
            assert trajectory.turns[-1].query is not None and trajectory.turns[-1].observation_tokens
            assert trajectory.baseline_prob is None and trajectory.turns[-1].info_gain is None
    assert groups == begin(*range(6)), "what was handed in has changed"


def test_going_on_in_the_same_step_changes_no_token(rollout, begin):
    whole, _ = run_on(rollout, begin(*range(6)), budgets=[None] * 6, version=0)
    pieces, counted = play_out(rollout, begin(*range(6)), budget=1)
    assert len(counted) >= 3
    for one, other in zip(members(pieces), members(whole), strict=True):
        assert (one.tokens, one.stop_reason) == (other.tokens, other.stop_reason)
        assert one.context_probs == pytest.approx(other.context_probs, rel=1e-4)
    assert sum(counts.sampled_tokens for counts in counted) == sum(
        t.num_sampled_tokens for t in members(whole)
    )


@pytest.fixture
def play_with_rows(engine, monkeypatch, rollout):
    """Return a function that plays groups. The engine's rows are bytes that tell the position and the version."""
    submit, step, first = engine.submit, engine.step, {}

    def submit_rows(request_id, tokens, *, experts_from, **options):
        first[request_id] = experts_from
        submit(request_id, tokens, experts_from=experts_from, **options)

    def play(groups, *, budget, version):
        def step_rows():
            return [
                dataclasses.replace(output, experts=row_bytes(first[output.request_id], end, version))
                if (end := output.num_prompt_tokens + len(getattr(output, "tokens", ())) - 1)
                and output.request_id in first
                else output
                for output in step()
            ]

        monkeypatch.setattr(engine, "submit", submit_rows)
        monkeypatch.setattr(engine, "step", step_rows)
        return run_on(rollout, groups, budgets=[budget] * len(groups), version=version)[0]

    return play


def row_bytes(start, end, version):
    return bytes((position + 100 * version) % 256 for position in range(start, end))


def test_each_position_has_one_row_of_experts_from_the_weights_that_end_it(play_with_rows, begin):
    paused = play_with_rows(begin(*range(6)), budget=1, version=0)
    before = copy.deepcopy(paused)
    ended = play_with_rows(paused, budget=None, version=1)
    assert paused == before, "what was handed in has changed"
    versions = set()
    for old, new in zip(members(paused), members(ended), strict=True):
        version = 0 if old.stop_reason else 1
        versions.add((version, len(new.turns) > 1))
        assert new.experts == row_bytes(0, packed_length(new), version)
    assert versions == {(0, False), (1, True)}


class NumberedSearch:
    """A search whose sessions number their answers, which shows whether a session was restarted."""

    def __init__(self):
        self.num_open = 0

    def open(self, record, question):
        self.num_open += 1
        return NumberedSession(self)

    def close(self):
        """Nothing to close, because only sessions have state."""


class NumberedSession:
    def __init__(self, tool):
        self.tool, self.num_calls = tool, 0

    def call(self, text):
        self.num_calls += 1
        return [f"Doc {self.num_calls} (Title: {text}) {text} is known."]

    def score(self):
        return self.num_calls / 10

    def close(self):
        self.tool.num_open -= 1


def test_going_on_repeats_the_calls_of_sessions_and_leaves_none_open(engine, engine_config, tokenizer, begin):
    config = dataclasses.replace(engine_config, group_size=2, max_turns=3, max_turn_tokens=48)
    tool = NumberedSearch()
    rollout = GroupRollout(
        engine, Toolset(tools={"search": tool}), tags(tokenizer, gain=config.gain), rollout=config
    )
    whole, whole_counts = run_on(rollout, begin(*range(6)), budgets=[None] * 6, version=0)
    pieces, counted = play_out(rollout, begin(*range(6)), budget=1)
    assert max(t.num_process_turns for t in members(whole)) >= 2 and len(counted) >= 3
    for one, other in zip(members(pieces), members(whole), strict=True):
        assert (one.tokens, one.stop_reason) == (other.tokens, other.stop_reason)
        scores = [turn.score for turn in one.process_turns]
        assert scores == [number / 10 for number in range(1, len(scores) + 1)]
    assert all(counts.tool_counts == {"tools/open_sessions": 0} for counts in (whole_counts, *counted))
    assert tool.num_open == 0
    rollout.close()


def test_a_carried_trajectory_keeps_its_tokens_and_is_scored_by_the_last_weights(
    rollout, begin, tokenizer, reference, other_weights
):
    groups = begin(0, 2, 3)
    first, _ = run_on(rollout, groups, budgets=[1] * 3, version=0)
    second, _ = run_on(rollout, first, budgets=[1] * 3, version=1)
    new_logprobs = other_weights()
    last, _ = run_on(rollout, second, budgets=[None] * 3, version=2)
    scaffold = tokenizer(NO_THOUGHT_IS_OPEN, add_special_tokens=False)["input_ids"]
    carried = [
        (group, before, after)
        for group, earlier in zip(last, second, strict=True)
        for before, after in zip(earlier.trajectories, group.trajectories, strict=True)
        if not before.stop_reason
    ]
    assert len(carried) >= 2, "too few were carried"
    for group, before, after in carried:
        past = len(before.turns)
        assert [(t.tokens, t.rollout_logprobs, t.observation_tokens, t.query) for t in before.turns] == [
            (t.tokens, t.rollout_logprobs, t.observation_tokens, t.query) for t in after.turns[:past]
        ]
        assert [turn.version for turn in after.turns] == [*range(past), *[2] * (len(after.turns) - past)]
        assert after.staleness(2) == 2
        # The engine's log-probs of old turns come from the old weights, those of new turns from the new weights.
        position = len(after.prompt_tokens)
        by_old, by_new = (
            logprobs(after.tokens, num_ids=len(tokenizer)) for logprobs in (reference, new_logprobs)
        )
        for turn in after.turns:
            end = position + len(turn.tokens)
            expected = (by_old if turn.version < 2 else by_new)[position - 1 : end - 1]
            assert turn.rollout_logprobs == pytest.approx(expected, abs=1e-3)
            position = end + len(turn.observation_tokens)
        # The answer's probability comes from the new weights in every context.
        answer = tokenizer(group.prompt.answers[0], add_special_tokens=False)["input_ids"]
        for length, prob in zip(after.context_lengths, after.context_probs, strict=True):
            scored = new_logprobs([*after.tokens[:length], *scaffold, *answer])[-len(answer) :]
            assert prob == pytest.approx(math.exp(sum(scored) / len(answer)), rel=2e-3)
        gains = [turn.info_gain for turn in after.turns if turn.query is not None]
        probs = after.context_probs
        assert gains == pytest.approx([b - a for a, b in itertools.pairwise(probs)], abs=1e-6)


def test_what_must_end_in_this_step_starts_first_then_the_carried_then_most_hops(begin):
    (prompt,) = (group.prompt for group in begin(0))

    def live(name, *, budget, past, hops):
        start = Trajectory(
            prompt_index=0,
            prompt_id=name,
            sample_index=0,
            prompt_tokens=[1],
            turns=[],
            stop_reason="",
            hops=hops,
        )
        group = PromptGroup(prompt=prompt, aliases=[])
        return LiveTrajectory(group=group, trajectory=start, tokens=[1], budget=budget, num_past_turns=past)

    waiting = [
        live("new", budget=9, past=0, hops=2),
        live("new, hard", budget=9, past=0, hops=4),
        live("carried", budget=9, past=3, hops=0),
        live("to its end", budget=None, past=1, hops=1),
    ]
    found = [one.trajectory.prompt_id for one in sorted(waiting, key=lambda one: one.start_order)]
    assert found == ["to its end", "carried", "new, hard", "new"]
    # Without budgets only hops decide; prompts with equally many hops keep their order.
    plain = [live(str(place), budget=None, past=0, hops=hops) for place, hops in enumerate([1, 3, 1, 3])]
    found = [one.trajectory.prompt_id for one in sorted(plain, key=lambda one: one.start_order)]
    assert found == ["1", "3", "0", "2"]


def test_seeds_of_a_carried_group_are_no_other_groups(begin):
    (prompt,) = (group.prompt for group in begin(0))
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=0, version=2)
    groups = [PromptGroup(prompt=prompt, aliases=[], begun=begun) for begun in (None, 2, 1, 0)]
    plain, fresh, old, older = (sampling.turn_seed(group, 0, 1) for group in groups)
    assert plain == fresh, "without carrying over, seeds are what they were"
    assert len({fresh, old, older}) == 3


def test_what_goes_on_does_not_depend_on_what_is_played_beside_it(rollout, begin):
    first, _ = run_on(rollout, begin(0, 2, 3), budgets=[1] * 3, version=0)
    unfinished = [group for group in first if not group.is_complete]
    assert unfinished
    fresh = begin(0, 1, 2, step=1)
    together, _ = run_on(rollout, [*unfinished, *fresh], budgets=[None] * (len(unfinished) + 3), version=1)
    for number, group in enumerate(unfinished):
        (alone,), _ = run_on(rollout, [group], budgets=[None], version=1)
        assert [t.tokens for t in alone.trajectories] == [t.tokens for t in together[number].trajectories]


class Parts(SimpleNamespace):
    """Stands in for a run with one process, on the tests' engine."""

    def __init__(self, rollout, prompts_of, **partial):
        super().__init__(
            config=RolloutConfig(prompts_per_step=3, group_size=2, partial=PartialConfig(**partial)),
            state=RolloutState(sampler=PromptSampler(3 * len(QUESTIONS), 3, seed=0)),
            prompts=SimpleNamespace(prompts=prompts_of),
            rollout=rollout,
        )

    def play(self, step):
        played = self.steps().play(version=step)
        return played.trajectories, played.metrics.values()

    def steps(self, *, should_stop=None):
        rollout = rewarded(self.rollout, should_stop=should_stop)
        return StepRollout(self.config, rollout, self.prompts, self.state, ALONE)


def test_an_endless_budget_and_no_further_prompts_play_the_steps_of_a_run_without(rollout, prompts_of):
    plain = Parts(rollout, prompts_of)
    partial = Parts(rollout, prompts_of, tokens_per_step=ENDLESS)
    for step in range(2):
        expected, metrics = plain.play(step)
        found, others = partial.play(step)
        assert_alike(as_dicts(found), as_dicts(expected))
        assert not any(name.startswith("partial/") for name in metrics)
        ours = {name: value for name, value in others.items() if name.startswith("partial/")}
        assert set(ours.values()) == {0.0}
        assert not partial.state.carried.entries


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_steps_are_whole_and_what_they_do_not_take_comes_later(rollout, prompts_of, max_staleness):
    settings = dict(tokens_per_step=1, extra_prompts=2, max_staleness=max_staleness)
    runs = [Parts(rollout, prompts_of, **settings) for _ in range(2)]
    stale, carried = 0, 0
    for step in range(4):
        held = runs[0].state.carried
        (found, metrics), (again, _) = (run.play(step) for run in runs)
        assert_alike(as_dicts(found), as_dicts(again))
        states = [run.state.carried for run in runs]
        assert states[0].entries == states[1].entries
        assert_alike(*(as_dicts(members(state.own)) for state in states))
        assert [(t.prompt_index, t.sample_index) for t in found] == [
            (p, s) for p in range(3) for s in range(2)
        ]
        assert all(t.stop_reason and t.baseline_prob is not None for t in found)
        staleness = [t.staleness(step) for t in found]
        assert metrics["partial/staleness_max"] == max(staleness) <= max_staleness
        assert metrics["partial/staleness_mean"] == pytest.approx(sum(staleness) / 6)
        left = runs[0].state.carried
        open_members = [t for t in members(left.own) if not t.stop_reason]
        assert metrics["partial/pool_groups"] == len(left.entries) == len(left.own) == 2
        assert metrics["partial/carried_trajectories"] == len(open_members)
        assert metrics["partial/carried_tokens"] == sum(t.num_sampled_tokens for t in open_members)
        # Every trajectory from the pool is trained on now or stays in the pool, and keeps all its tokens.
        now = {(t.prompt_id, t.sample_index): t.tokens for t in [*found, *members(left.own)]}
        for old in members(held.own):
            tokens = now[old.prompt_id, old.sample_index]
            assert tokens[: old.num_tokens] == old.tokens
        stale += sum(staleness)
        carried += len(open_members)
    assert stale and carried, "nothing was carried over"


def test_a_rollout_that_is_broken_off_gives_nothing(rollout, prompts_of):
    parts = Parts(rollout, prompts_of, tokens_per_step=1, extra_prompts=2)
    parts.play(0)
    before = parts.state.carried
    kept = [group.trajectories[0].to_dict() for group in before.own]
    assert parts.steps(should_stop=lambda: True).play(version=1) is None
    assert [group.trajectories[0].to_dict() for group in before.own] == kept
