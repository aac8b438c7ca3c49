"""Which engine plays a prompt. Two engines play in turn, as if they computed a pass in the same time."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from played import tags
from scripted_engine import ScriptedEngine
from scripted_search import ScriptedSearch, toolset_of
from tiny_models import build_tokenizer

from a2tgpo.collect.assignment import Assignment
from a2tgpo.config.rollout import RolloutConfig, TreeConfig
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt

NUM_ENGINES, SLOTS, GROUP_SIZE, NUM_PROMPTS = 2, 4, 2, 24
PLAIN, TREE = TreeConfig(), TreeConfig(initial=1)


class SlottedEngine(ScriptedEngine):
    """Samples one token of each of the first `SLOTS` requests in a step. A request's seed determines its text.

    Odd questions have short answers. Even questions have long answers, and `call_share` of their turns are searches.
    """

    def __init__(self, tokenizer, call_share):
        super().__init__(tokenizer, lambda _: self._text)
        self._call_share = call_share
        self.num_steps = 0
        self.most = 0
        self._left = {}

    def submit(self, request_id, tokens, *, seed, **rest):
        draw = random.Random(seed)
        is_long = "long" in self._tokenizer.decode(list(tokens))
        thought = " a" * draw.randint(20, 60) if is_long else ""
        self._text = f"<think>{thought} </think> <answer> \\boxed{{Rome}} </answer>"
        if is_long and draw.random() < self._call_share:
            self._text = "<think> a </think> <search> river </search>"
        super().submit(request_id, tokens, **rest)
        self._left[request_id] = len(self._outputs[-1].tokens)
        self.most = max(self.most, len(self._outputs))

    def step(self):
        self.num_steps += 1
        for output in self._outputs[:SLOTS]:
            self._left[output.request_id] -= 1
        ended = [output for output in self._outputs if not self._left[output.request_id]]
        self._outputs = [output for output in self._outputs if self._left[output.request_id]]
        return ended


class Questions:
    """Stands in for a `PromptSet`, in which the even questions are long."""

    def __init__(self, tokenizer, hops=lambda index: 0):
        self.questions = [SimpleNamespace(hops=hops(index)) for index in range(NUM_PROMPTS)]
        self._tokens = [tuple(tokenizer(text)["input_ids"]) for text in ("long?", "short?")]

    def prompts(self, indices, positions):
        return [
            Prompt(
                index=place,
                id=f"q{indices[place]}",
                question="",
                answers=("Rome",),
                tokens=self._tokens[indices[place] % 2],
            )
            for place in positions
        ]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def play(tokenizer, store, *, tree=PLAIN, call_share=0.5, delay=0):
    """Play a draw on all engines. Return each engine, the trajectories that it played, and its counts.

    The engine that has computed the fewest passes plays next. Engine 0 begins `delay` passes late.
    """
    config = RolloutConfig(group_size=GROUP_SIZE, max_concurrent=SLOTS, max_turns=3, tree=tree)
    played = []
    with contextlib.ExitStack() as stack:
        for index in range(NUM_ENGINES):
            engine = SlottedEngine(tokenizer, call_share)
            rollout = GroupRollout(engine, toolset_of(ScriptedSearch()), tags(tokenizer), rollout=config)
            stack.callback(rollout.close)
            group = EngineGroup(index=index, count=NUM_ENGINES)
            assignment = Assignment(config, Questions(tokenizer), group, store=store)
            prompts, queue = assignment.divide(range(NUM_PROMPTS), range(NUM_PROMPTS))
            counts = RolloutCounts()
            playing = rollout.play(prompts, seed=0, version=0, score_gain=False, queue=queue, counts=counts)
            played.append((engine, playing, [], counts))
        open_ = list(played)
        while open_:
            at = min(open_, key=lambda each: each[0].num_steps + delay * (each is played[0]))
            try:
                done = next(at[1])
            except StopIteration:
                open_.remove(at)
                continue
            at[2].extend([done.trajectory] if done else [])
    return [(engine, trajectories, counts) for engine, _, trajectories, counts in played]


def rollouts(played):
    """Return the trajectories of all engines, sorted."""
    found = [trajectory for _, trajectories, _ in played for trajectory in trajectories]
    found.sort(key=lambda trajectory: (trajectory.prompt_index, trajectory.sample_index))
    return [trajectory.to_dict() for trajectory in found]


def players(played):
    """Return the prompts that each engine played."""
    return [{trajectory.prompt_index for trajectory in trajectories} for _, trajectories, _ in played]


@pytest.mark.parametrize("tree", [PLAIN, TREE], ids=["plain", "tree"])
def test_every_group_is_played_once_and_as_with_fixed_shares(tokenizer, tree):
    fixed = play(tokenizer, None, tree=tree)
    on_demand = play(tokenizer, dist.HashStore(), tree=tree)
    late = play(tokenizer, dist.HashStore(), tree=tree, delay=100)
    assert players(fixed) == [set(range(0, NUM_PROMPTS, 2)), set(range(1, NUM_PROMPTS, 2))]
    assert players(on_demand) != players(fixed) and players(late) != players(on_demand)
    assert len(rollouts(fixed)) == NUM_PROMPTS * GROUP_SIZE
    assert rollouts(on_demand) == rollouts(late) == rollouts(fixed)
    for mine, others in (players(on_demand), players(late)):
        assert not mine & others


def test_the_longest_engine_needs_fewer_steps_if_engines_take_prompts_on_demand(tokenizer):
    # Without searches, because their answers arrive after an unknown number of steps.
    fixed, on_demand = (play(tokenizer, store, call_share=0) for store in (None, dist.HashStore()))
    steps, fewer = ([engine.num_steps for engine, *_ in played] for played in (fixed, on_demand))
    assert steps[0] > 3 * steps[1], "the fixed shares are not skewed"
    assert max(fewer) < 0.7 * max(steps)
    assert max(fewer) - min(fewer) < 0.2 * max(fewer)


def test_an_engine_takes_a_prompt_only_when_a_slot_is_free(tokenizer):
    for engine, trajectories, counts in play(tokenizer, dist.HashStore(), call_share=0):
        assert engine.most == SLOTS + GROUP_SIZE - 1, "a group may have more trajectories than slots are free"
        assert counts.taken_groups == len({t.prompt_index for t in trajectories}) - SLOTS // GROUP_SIZE


def test_a_draw_that_fits_into_the_slots_is_divided_as_with_fixed_shares(tokenizer):
    config = RolloutConfig(group_size=GROUP_SIZE, max_concurrent=NUM_PROMPTS)
    for index in range(NUM_ENGINES):
        group = EngineGroup(index=index, count=NUM_ENGINES)
        assignment = Assignment(config, Questions(tokenizer), group, store=dist.HashStore())
        prompts, queue = assignment.divide(range(NUM_PROMPTS), range(NUM_PROMPTS))
        assert [prompt.index for prompt in prompts] == list(range(index, NUM_PROMPTS, NUM_ENGINES))
        assert not list(queue)


def test_the_queue_has_the_questions_with_the_fewest_hops(tokenizer):
    config = RolloutConfig(group_size=GROUP_SIZE, max_concurrent=SLOTS)
    questions = Questions(tokenizer, hops=lambda index: index % 3)
    store, order = dist.HashStore(), list(range(NUM_PROMPTS))[::-1]
    first, second = (
        Assignment(config, questions, EngineGroup(index=index, count=2), store=store) for index in range(2)
    )
    for drawn in (range(12), range(12, 24)):
        (mine, queue), (theirs, other_queue) = (each.divide(order, drawn) for each in (first, second))
        begun = [*mine, *theirs]
        assert {order[prompt.index] % 3 for prompt in begun} == {2} and len(begun) == 4
        taken = [next(queue), next(other_queue), *other_queue, *queue]
        hops = [order[prompt.index] % 3 for prompt in taken]
        assert hops == sorted(hops, reverse=True)
        assert sorted(prompt.index for prompt in [*begun, *taken]) == list(drawn)
