"""Branches that begin inside a turn. The engine draws its texts from the seeds of its requests."""

import dataclasses
import random
import statistics

import pytest
from played import prompts_of, rewarded, rollouts_of, run
from scripted_engine import ScriptedEngine
from scripted_search import ScriptedSearch
from tiny_models import build_tokenizer

from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.inner_branches import TOP_LOGPROBS
from a2tgpo.rollout.multi_turn import MIN_TURN_TOKENS

GROUP_SIZE, COUNT = 3, 4
QUESTION = "Which?"
QUERIES = ("river", "riverside", "sea", "seaside", "lake")
TEXTS = (
    *(f"<think> So. </think> <answer> \\boxed{{{city}}} </answer>" for city in ("Rome", "Romford")),
    *(f"<think> a </think> <search> {query} </search>" for query in QUERIES),
)


class CompletingEngine(ScriptedEngine):
    """Draw each turn with its seed from the texts that fit the context. Entropies depend on the turn alone."""

    entropies = (0.0, 0.5, 2.0)
    experts = b""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, lambda _: self._text)
        self.max_tokens = {}

    def submit(self, request_id, tokens, *, seed, top_logprobs=0, **rest):
        context = self._tokenizer.decode(list(tokens)).removeprefix(QUESTION)
        begun = context.rpartition("</result>")[2].lstrip()
        fitting = [text for text in TEXTS if text.startswith(begun)]
        self._text = random.Random(seed).choice(fitting)[len(begun) :]
        super().submit(request_id, tokens, **rest)
        output = self._outputs[-1]
        found = entropies_of(output.tokens, self.entropies) if top_logprobs == TOP_LOGPROBS else []
        self._outputs[-1] = dataclasses.replace(output, entropies=found, experts=self.experts)
        self.max_tokens[tuple(tokens)] = rest["max_tokens"]


def entropies_of(tokens, levels):
    draw = random.Random(f"{list(tokens)}")
    return [draw.choice(levels) for _ in tokens]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def open_rollout(tokenizer):
    settings = {"group_size": GROUP_SIZE, "max_turns": 4, "inner_branches": COUNT}
    with rollouts_of(CompletingEngine, tokenizer, **settings) as open_rollout:
        yield open_rollout


def split(trajectories):
    """Return the trajectories that begin at the prompt, by prompt and sample, and the inner branches."""
    initial = {(t.prompt_index, t.sample_index): t for t in trajectories if t.branch is None}
    return initial, [t for t in trajectories if t.branch]


def expected_points(members, tokenizer, limits):
    """Return (parent, turn, number of tokens) of the best places to branch, by plain loops."""
    candidates = []
    for t in members:
        entropies = [entropies_of(turn.tokens, CompletingEngine.entropies) for turn in t.turns]
        flat = [value for values in entropies for value in values]
        mean, spread = statistics.fmean(flat), statistics.pstdev(flat)
        past = 0
        for number, turn in enumerate(t.turns):
            for k in range(len(turn.tokens) - 1):
                z = round((entropies[number][k] - mean) / (spread + 1e-6), 3)
                begun = tokenizer.decode(turn.tokens[: k + 1])
                is_blank = not tokenizer.decode(turn.tokens[k : k + 1]).strip()
                # "<", "</", "</s", ... could be the beginning of </search> or of </answer>.
                last = begun[begun.rfind("<") :] if "<" in begun else "-"
                is_open = "</search>".startswith(last) or "</answer>".startswith(last)
                has_room = past + k + 1 + MIN_TURN_TOKENS <= limits
                if z > 0 and not is_blank and not is_open and has_room:
                    candidates.append((-z, t.sample_index, number, k + 1))
            past += len(turn.tokens) + len(turn.observation_tokens)
    return [place[1:] for place in sorted(candidates)[:COUNT]]


def test_branches_begin_after_the_tokens_of_highest_entropy_that_allow_one(open_rollout, tokenizer):
    for limit in (6192, 90):
        rollout = open_rollout(max_response_tokens=limit)
        trajectories, _ = run(rollout, prompts_of(tokenizer, 8))
        initial, branches = split(trajectories)
        for prompt in range(8):
            members = [t for (index, _), t in initial.items() if index == prompt]
            own = [t for t in branches if t.prompt_index == prompt]
            assert [t.sample_index for t in own] == [GROUP_SIZE + place for place in range(len(own))]
            found = [(t.branch.parent, len(t.branch.owners), t.branch.num_tokens) for t in own]
            assert found == expected_points(members, tokenizer, limit)
            assert len(set(found)) == len(found)
        assert len({t.branch.num_tokens for t in branches}) > 3


def test_a_branch_inside_a_query_asks_the_query_that_the_whole_turn_writes(open_rollout, tokenizer):
    rollout = open_rollout(inner_branches=30)
    initial, branches = split(run(rollout, prompts_of(tokenizer, 8))[0])
    inside = changed = 0
    for t in branches:
        parent, number, count = (
            initial[t.prompt_index, t.branch.parent],
            len(t.branch.owners),
            t.branch.num_tokens,
        )
        for mine, played in zip(t.turns[:number], parent.turns, strict=False):
            assert (mine.tokens, mine.observation_tokens) == (played.tokens, played.observation_tokens)
        turn, begun = t.turns[number], parent.turns[number]
        assert turn.tokens[:count] == begun.tokens[:count]
        assert turn.rollout_logprobs[:count] == begun.rollout_logprobs[:count]
        assert len(turn.rollout_logprobs) == len(turn.tokens) > count
        text = tokenizer.decode(turn.tokens)
        assert text in TEXTS
        if turn.is_process:
            query = text.split("<search> ")[1].split(" </search>")[0]
            assert turn.query == query and query in tokenizer.decode(turn.observation_tokens)
            inside += "<search>" in tokenizer.decode(turn.tokens[:count])
            changed += query != begun.query
    assert inside > 10 and changed > 3
    assert any(t.branch.owners for t in branches)


def test_a_branch_pays_only_for_what_it_plays_and_its_gains_are_not_scored(open_rollout, tokenizer):
    rollout = open_rollout(max_turn_tokens=40)
    trajectories, counts = run(rollout, prompts_of(tokenizer, 6))
    initial, branches = split(trajectories)
    assert counts.sampled_tokens == sum(t.num_sampled_tokens - t.num_shared_tokens for t in trajectories)
    assert all(0 < t.num_shared_tokens < t.num_sampled_tokens for t in branches)
    shared_calls = sum(len(t.branch.owners) for t in branches)
    assert counts.tool_calls == sum(t.num_process_turns for t in trajectories) - shared_calls
    assert len(rollout._engine.scored) == 6 + sum(t.num_process_turns for t in initial.values())
    assert all(turn.info_gain is None for t in branches for turn in t.turns)
    for t in branches:
        begun = t.turns[len(t.branch.owners)].tokens[: t.branch.num_tokens]
        context = (*t.tokens[: t.context_lengths[len(t.branch.owners)]], *begun)
        assert rollout._engine.max_tokens[context] == 40 - len(begun)


def test_inner_branches_do_not_depend_on_what_else_their_engine_plays(open_rollout, tokenizer):
    prompts = prompts_of(tokenizer, 4)
    together, _ = run(open_rollout(), prompts)
    slow = ScriptedSearch(delays={"river": 0.02})
    alone = [run(open_rollout(search=slow), [prompt])[0] for prompt in reversed(prompts)]
    assert [t.to_dict() for t in together] == [t.to_dict() for group in reversed(alone) for t in group]


def test_the_trajectories_are_those_of_a_rollout_without_inner_branches(open_rollout, tokenizer):
    plain, _ = run(open_rollout(inner_branches=0), prompts_of(tokenizer, 3))
    initial, branches = split(run(open_rollout(), prompts_of(tokenizer, 3))[0])
    assert [t.to_dict() for t in plain] == [t.to_dict() for t in initial.values()] and branches
    evaluated, _ = run(open_rollout(), prompts_of(tokenizer, 2), group_size=5, score_gain=False)
    assert [t.sample_index for t in evaluated] == [*range(5), *range(5)]


def test_no_turn_of_a_branch_holds_experts_and_each_other_turn_does(open_rollout, tokenizer):
    rollout = open_rollout(inner_branches=30)
    rollout._engine.experts = b"rows"
    initial, branches = split(run(rollout, prompts_of(tokenizer, 4))[0])
    assert {turn.experts for t in initial.values() for turn in t.turns} == {b"rows"}
    assert {turn.experts for t in branches for turn in t.turns} == {b""}
    assert any(t.branch.owners for t in branches)


def test_without_uncertain_tokens_there_are_no_inner_branches(open_rollout, tokenizer):
    rollout = open_rollout()
    rollout._engine.entropies = (0.5,)
    assert not split(run(rollout, prompts_of(tokenizer, 3))[0])[1]


def test_a_step_gets_judged_branches_in_their_parents_and_only_the_parents_as_rows(open_rollout, tokenizer):
    _, branches = split(run(open_rollout(), prompts_of(tokenizer, 3))[0])
    played = rewarded(open_rollout()).play(prompts_of(tokenizer, 3), version=0, counts=RolloutCounts())
    assert [(t.prompt_index, t.sample_index) for t in played] == [
        (prompt, sample) for prompt in range(3) for sample in range(GROUP_SIZE)
    ]
    assert all(b.branch.parent == t.sample_index for t in played for b in t.inner_branches)
    inner = sorted(
        (b for t in played for b in t.inner_branches), key=lambda b: (b.prompt_index, b.sample_index)
    )
    assert [b.to_dict() for b in inner] == [b.to_dict() for b in branches]
    assert len({b.outcome_reward for b in inner}) > 1
