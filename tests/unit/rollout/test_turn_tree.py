"""Trees of trajectories that branch between turns. The engine draws its texts from the seeds of its requests."""

import dataclasses
import itertools
import random

import pytest
from played import prompts_of, rollouts_of, run
from scripted_engine import ScriptedEngine
from scripted_search import ScriptedSearch
from tiny_models import build_tokenizer

from a2tgpo.config.rollout import TreeConfig
from a2tgpo.rollout.turn_tree import BranchPoint, entropy_points, random_points
from a2tgpo.trajectory import Branch, Call, Trajectory, Turn

GROUP_SIZE = 9
ENTROPY = TreeConfig(initial=3, rounds=2)
RANDOM = TreeConfig(initial=3, rounds=2, choice="random")
ANSWER = "<think> So. </think> <answer> \\boxed{Rome} </answer>"


class DrawingEngine(ScriptedEngine):
    """Draw each turn and its log-probs by the seed alone. A third of the turns are answers."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, lambda _: self._text)

    def submit(self, request_id, tokens, *, seed, **rest):
        draw = random.Random(seed)
        query = f"<think> a </think> <search> {draw.choice(['river', 'lake', 'sea'])} </search>"
        self._text = ANSWER if draw.random() < 1 / 3 else query
        super().submit(request_id, tokens, **rest)
        output = self._outputs[-1]
        level = draw.choice([0.25, 0.5, 1.0])
        self._outputs[-1] = dataclasses.replace(output, logprobs=[-level] * len(output.tokens))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def open_rollout(tokenizer):
    with rollouts_of(DrawingEngine, tokenizer, group_size=GROUP_SIZE, max_turns=4) as opened:
        yield lambda tree, **settings: opened(tree=tree, **settings)


def shared(trajectory):
    return len(trajectory.branch.owners) if trajectory.branch else 0


def as_played(turn):
    return turn.tokens, turn.observation_tokens, turn.rollout_logprobs, turn.calls, turn.info_gain


@pytest.mark.parametrize("tree", [ENTROPY, RANDOM], ids=["entropy", "random"])
def test_a_branch_keeps_the_turns_of_those_who_played_them_and_plays_the_rest(open_rollout, tokenizer, tree):
    rollout = open_rollout(tree)
    trajectories, counts = run(rollout, prompts_of(tokenizer, 6))
    groups = [list(group) for _, group in itertools.groupby(trajectories, lambda t: t.prompt_index)]
    assert len(groups) == 6
    for group in groups:
        assert [t.sample_index for t in group] == list(range(GROUP_SIZE))
        assert [t.branch is None for t in group] == [True] * 3 + [False] * 6
        for t in group[3:]:
            assert t.branch.parent < (3 if t.sample_index < 6 else 6)
            assert t.root == group[t.branch.parent].root < 3
            assert shared(t) < len(t.turns) and t.branch.owners == tuple(t.owners[: shared(t)])
            for index, owner in enumerate(t.owners):
                assert as_played(t.turns[index]) == as_played(group[owner].turns[index])
    assert any(shared(t) > 1 for t in trajectories)
    assert any(t.branch.parent > 2 for t in trajectories if t.branch)
    # A turn is sampled, called and scored once, however many trajectories contain it.
    own = [turn for t in trajectories for turn in t.turns[shared(t) :]]
    assert counts.sampled_tokens == sum(len(turn.tokens) for turn in own)
    assert counts.tool_calls == sum(turn.is_process for turn in own)
    assert len(rollout._engine.scored) == 6 + counts.tool_calls


@pytest.mark.parametrize("tree", [ENTROPY, RANDOM], ids=["entropy", "random"])
def test_a_tree_does_not_depend_on_what_else_its_engine_plays(open_rollout, tokenizer, tree):
    prompts = prompts_of(tokenizer, 4)
    together, _ = run(open_rollout(tree), prompts)
    slow = ScriptedSearch(delays={"river": 0.02})
    alone = [run(open_rollout(tree, search=slow), [prompt])[0] for prompt in reversed(prompts)]
    expect = [t.to_dict() for group in reversed(alone) for t in group]
    assert [t.to_dict() for t in together] == expect
    other, _ = run(open_rollout(tree), prompts, seed=1)
    assert [t.to_dict() for t in other] != expect


def test_branches_sample_with_their_own_seeds(open_rollout, tokenizer):
    trajectories, _ = run(open_rollout(ENTROPY), prompts_of(tokenizer, 6))
    again = [
        (t.turns[shared(t)], trajectories[t.prompt_index * GROUP_SIZE + t.branch.parent].turns[shared(t)])
        for t in trajectories
        if t.branch
    ]
    differ = [mine.tokens != parents.tokens for mine, parents in again]
    assert 0.4 < sum(differ) / len(differ) < 1  # of four texts, about a quarter are drawn again


def test_only_a_training_rollout_has_branches(open_rollout, tokenizer):
    trajectories, _ = run(open_rollout(ENTROPY), prompts_of(tokenizer, 2), group_size=5, score_gain=False)
    assert [t.sample_index for t in trajectories] == [*range(5), *range(5)]
    assert all(t.branch is None for t in trajectories)


def test_the_first_trajectories_are_those_of_a_rollout_without_a_tree(open_rollout, tokenizer):
    plain, _ = run(open_rollout(TreeConfig()), prompts_of(tokenizer, 3))
    grown, _ = run(open_rollout(ENTROPY), prompts_of(tokenizer, 3))
    first = [t.to_dict() for t in plain if t.sample_index < 3]
    assert first == [t.to_dict() for t in grown if t.sample_index < 3]


def test_a_rollout_that_is_left_in_a_later_round_leaves_nothing_behind(open_rollout, tokenizer):
    rollout = open_rollout(RANDOM)
    playing = rollout.play(prompts_of(tokenizer, 2), seed=0, version=0)
    for done in rollout.finished(playing):
        if done.trajectory.sample_index >= 6:
            break
    playing.close()
    assert not rollout._engine.has_unfinished
    trajectories, _ = run(rollout, prompts_of(tokenizer, 1))
    assert len(trajectories) == GROUP_SIZE


class Counting:
    """A tool whose sessions count their calls."""

    def open(self, record, question):
        calls = itertools.count(1)
        return type("Session", (), {"call": lambda _, text: [f"{next(calls)}"], "close": lambda _: None})()

    def close(self):
        """Nothing to close."""


def test_a_branch_has_a_session_of_its_own_in_the_state_of_the_shared_turns(open_rollout, tokenizer):
    rollout = open_rollout(RANDOM, more_tools={"count": Counting()})
    submit = rollout._engine.submit

    def count_instead_of_search(*arguments, **settings):
        submit(*arguments, **settings)
        output = rollout._engine._outputs[-1]
        text = output.text.replace("search>", "count>")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stop = output.stop_string and output.stop_string.replace("search>", "count>")
        rollout._engine._outputs[-1] = dataclasses.replace(
            output, text=text, tokens=ids, logprobs=[-0.5] * len(ids), stop_string=stop
        )

    rollout._engine.submit = count_instead_of_search
    trajectories, _ = run(rollout, prompts_of(tokenizer, 4))
    assert any(shared(t) and t.num_process_turns > shared(t) for t in trajectories)
    for t in trajectories:
        answers = [tokenizer.decode(turn.observation_tokens) for turn in t.process_turns]
        assert [f"{number}" in text for number, text in enumerate(answers, start=1)] == [True] * len(answers)


def made(sample, entropies, *, queries=None, branch=None, final=True):
    turns = [
        Turn(
            tokens=[1, ord(query)],
            rollout_logprobs=[-entropy, -entropy],
            calls=[Call(tool="search", arguments=query)],
            observation_tokens=[3],
        )
        for entropy, query in zip(entropies, queries or "abcdefgh"[sample:], strict=False)
    ]
    turns += [Turn(tokens=[2, sample], rollout_logprobs=[-9.0, -9.0])] * final
    return Trajectory(
        prompt_index=0,
        prompt_id="q",
        sample_index=sample,
        prompt_tokens=[0],
        turns=turns,
        stop_reason="answer",
        branch=branch,
    )


def test_the_turns_with_the_highest_entropy_are_played_again_but_no_final_turn():
    members = [made(0, [0.5, 2.0]), made(1, [1.0, 0.25, 1.5])]
    points = entropy_points(members, 3, sibling_penalty=0.0)
    assert points == [BranchPoint(0, 1), BranchPoint(1, 2), BranchPoint(1, 0)]


def test_siblings_lower_the_value_of_a_turn_and_shared_turns_count_once():
    members = [made(0, [1.0, 0.75]), made(1, [0.9])]
    members.append(made(2, [1.0, 0.5], branch=Branch(parent=0, root=0, owners=(0,))))
    free = entropy_points(members, 4, sibling_penalty=0.0)
    assert free == [BranchPoint(0, 0), BranchPoint(1, 0), BranchPoint(0, 1), BranchPoint(2, 1)]
    # Each of the four turns has one sibling: two first turns, and two that follow the first turn of trajectory 0.
    assert entropy_points(members, 4, sibling_penalty=0.1) == free
    members.append(made(3, [0.1]))
    assert entropy_points(members, 2, sibling_penalty=0.3) == [BranchPoint(0, 1), BranchPoint(0, 0)]


def test_equal_turns_are_chosen_in_order_whatever_the_last_bits_of_their_log_probs():
    for noise in (-1e-6, 1e-6):
        members = [made(0, [0.5], queries="a"), made(1, [0.5 + noise], queries="a")]
        assert entropy_points(members, 1, sibling_penalty=0.05) == [BranchPoint(0, 0)]


@pytest.mark.parametrize("count", [1, 5])
def test_without_enough_turns_branches_share_turns_or_begin_at_the_prompt(count):
    single, none = [made(0, [0.5]), made(1, [])], [made(0, []), made(1, [])]
    assert entropy_points(single, count, sibling_penalty=0.05) == [BranchPoint(0, 0)] * count
    at_prompt = [BranchPoint(place % 2, 0) for place in range(count)]
    assert entropy_points(none, count, sibling_penalty=0.05) == at_prompt
    assert random_points(none, count, seed="s") == at_prompt


def test_random_branches_follow_different_turns_and_every_tree_gets_its_share():
    members = [made(0, [0.5] * 3), made(1, [0.5]), made(2, [0.5] * 2)]
    members.append(made(3, [0.5] * 3, branch=Branch(parent=0, root=0, owners=(0, 0))))
    draws = [random_points(members, 6, seed=f"{number}") for number in range(40)]
    for points in draws:
        roots = [members[point.parent].root for point in points]
        assert roots == [0, 1, 2, 0, 1, 2]
        assert len({point for point in points if members[point.parent].root != 1}) == 4
        assert all(1 <= p.num_shared <= members[p.parent].num_process_turns for p in points)
        assert all(p.num_shared > 2 for p in points if p.parent == 3)
    assert {p for points in draws for p in points} == {
        *(BranchPoint(0, number) for number in (1, 2, 3)),
        *(BranchPoint(1, 1), BranchPoint(2, 1), BranchPoint(2, 2), BranchPoint(3, 3)),
    }
    assert random_points(members, 6, seed="7") == draws[7]
    assert random_points(members, 6, seed="other prompt") != random_points(members, 6, seed="prompt")


@pytest.mark.parametrize(
    ("tree", "group_size", "sizes"),
    [
        (TreeConfig(initial=10, rounds=2), 22, [10, 6, 6]),
        (TreeConfig(initial=2), 6, [2, 4]),
        (TreeConfig(initial=3, rounds=3), 8, [3, 2, 2, 1]),
    ],
)
def test_rounds_fill_the_group(tree, group_size, sizes):
    assert tree.round_sizes(group_size) == sizes
