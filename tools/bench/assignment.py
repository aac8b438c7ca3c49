"""Count the steps of the engine that ends last, with prompts on demand and with fixed shares.

The bench measures no time. It simulates engines in which each busy slot samples one token per engine step, tools
answer at once, and scoring and prefill take no steps. All engines take the same time for a step. The trainer's own
code (`collect/assignment.py`, `rollout/group_rollout.py`) divides and plays the prompts. A rollout has 64 prompts
with 16 trajectories each, on 8 engines. Questions have 1 to 4 hops. A trajectory searches once for each hop, and
sometimes more often. The bench runs with data that give the number of hops, with data that leave it out, and with
lengths that also differ between questions for reasons that the data do not give.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import measure
import torch.distributed as dist
from lengths import planned_turn
from transformers import AutoTokenizer

from a2tgpo.collect.assignment import Assignment
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.template import PromptTemplate
from a2tgpo.environment.tool import Toolset
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.protocol.tags import TagProtocol
from a2tgpo.rollout.engine_output import EngineOutput
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt

MODEL = "artifacts/models/tiny-qwen3"
ENGINES, GROUPS, GROUP_SIZE = 8, 64, 16
MEDIAN, LONGEST, MORE_SHARE, MAX_HOPS, MAX_TURNS = 110, 400, 0.25, 4, 6
SLOTS = (16, 32)
STEPS = 20


@dataclass(frozen=True)
class Workload:
    """The lengths of trajectories, and what the data tell about them."""

    name: str
    knows_hops: bool
    """Whether the data give the number of hops of each question."""
    spread: float = 0.0
    """Each question's lengths have a common log-normal factor. This is the standard deviation of its logarithm."""

    def length(self, seed: int, *, question: int) -> int:
        """Return the number of tokens that a trajectory samples."""
        factor = math.exp(random.Random(-1 - question).gauss(0, self.spread)) if self.spread else 1.0
        return math.ceil(factor * _length(seed, question=question))


WORKLOADS = (
    Workload("hops known", knows_hops=True),
    Workload("hops unknown", knows_hops=False),
    Workload("hops unknown, long tails", knows_hops=False, spread=0.5),
)


class CountedEngine:
    """A simulated engine, which counts its steps. Each trajectory is one turn with the length of all its turns."""

    max_model_len = 10**6

    def __init__(self, slots: int, workload: Workload):
        self.num_steps = 0
        self._workload = workload
        self._free = slots
        self._waiting: deque[tuple[str, int]] = deque()
        self._running: list[tuple[int, str, int]] = []
        """(step in which it ends, id, length) of each running request, as a heap."""

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, request_id: str, tokens: list[int], *, seed: int, **_: Any) -> None:
        self._waiting.append((request_id, self._workload.length(seed, question=tokens[0])))

    def step(self) -> list[EngineOutput]:
        while self._free and self._waiting:
            request_id, length = self._waiting.popleft()
            heapq.heappush(self._running, (self.num_steps + length, request_id, length))
            self._free -= 1
        self.num_steps += 1
        ended = []
        while self._running and self._running[0][0] == self.num_steps:
            _, request_id, length = heapq.heappop(self._running)
            self._free += 1
            ended.append(_answer(request_id, length))
        return ended


def _hops(question: int) -> int:
    return random.Random(question).randint(1, MAX_HOPS)


def _length(seed: int, *, question: int) -> int:
    """Return the number of tokens that a trajectory samples for a question with its number of hops."""
    length, rng = 0, random.Random(seed)
    for turn in range(MAX_TURNS + 1):
        sampled, searches_again = planned_turn(
            rng.getrandbits(63), median=MEDIAN, longest=LONGEST, call_share=MORE_SHARE
        )
        length += sampled
        if turn >= _hops(question) and not searches_again:
            break
    return length


def _answer(request_id: str, length: int) -> EngineOutput:
    return EngineOutput(
        request_id=request_id,
        tokens=[0] * length,
        logprobs=[0.0] * length,
        text="<answer> \\boxed{a} </answer>",
        finish_reason="stop",
        stop_string="</answer>",
        num_prompt_tokens=1,
        num_cached_tokens=0,
    )


def _prompts(indices: list[int], positions: list[int], hops: list[int]) -> list[Prompt]:
    return [
        Prompt(
            index=place,
            id=str(indices[place]),
            question="",
            answers=("a",),
            tokens=(indices[place],),
            hops=hops[indices[place]],
        )
        for place in positions
    ]


def engine_steps(
    protocol: TagProtocol, workload: Workload, *, slots: int, store: dist.Store | None
) -> list[list[int]]:
    """Return the number of steps of each engine in each rollout.

    Args:
        store: the store of `Assignment`, or None for fixed shares.
    """
    config = RolloutConfig(
        group_size=GROUP_SIZE, max_concurrent=slots, max_turn_tokens=10**6, max_response_tokens=10**6
    )
    hops = [_hops(question) if workload.knows_hops else 0 for question in range(GROUPS * STEPS)]
    questions: Any = SimpleNamespace(
        prompts=lambda indices, positions: _prompts(indices, positions, hops),
        questions=[SimpleNamespace(hops=number) for number in hops],
    )
    assignments = [
        Assignment(config, questions, EngineGroup(index=index, count=ENGINES), store=store)
        for index in range(ENGINES)
    ]
    return [
        _play(protocol, config, workload, assignments, [step * GROUPS + place for place in range(GROUPS)])
        for step in range(STEPS)
    ]


def _play(
    protocol: TagProtocol,
    config: RolloutConfig,
    workload: Workload,
    assignments: list[Assignment],
    drawn: list[int],
) -> list[int]:
    engines = [CountedEngine(config.max_concurrent, workload) for _ in assignments]
    toolset = Toolset(tools={}, max_concurrent_calls=1)
    rollouts = [GroupRollout(cast(Any, engine), toolset, protocol, rollout=config) for engine in engines]
    playing = []
    for engine, rollout, assignment in zip(engines, rollouts, assignments, strict=True):
        prompts, queue = assignment.divide(drawn, range(GROUPS))
        playing.append((engine, rollout.play(prompts, seed=0, version=0, score_gain=False, queue=queue)))
    num_ended = 0
    while playing:
        # The engine that has computed the fewest steps plays next, so all engines are equally fast.
        engine, items = least = min(playing, key=lambda pair: pair[0].num_steps)
        try:
            num_ended += next(items) is not None
        except StopIteration:
            playing.remove(least)
    assert num_ended == GROUPS * GROUP_SIZE, "a trajectory was lost"
    for rollout in rollouts:
        rollout.close()
    return [engine.num_steps for engine in engines]


def rows() -> list[measure.Row]:
    template = PromptTemplate(AutoTokenizer.from_pretrained(MODEL), "")
    protocol = TagProtocol(template, tools=("search",))
    found = []
    for slots, workload in itertools.product(SLOTS, WORKLOADS):
        fixed = engine_steps(protocol, workload, slots=slots, store=None)
        on_demand = engine_steps(protocol, workload, slots=slots, store=dist.HashStore())
        shape = f"{GROUPS * GROUP_SIZE // ENGINES} trajectories per engine in {slots} slots, {workload.name}"
        for name, value in (
            ("steps of the engine that ends last", _longest),
            ("steps without work, mean engine", _idle),
        ):
            found.append(
                measure.compared(
                    f"{name}, {shape}",
                    [value(on_demand)],
                    [value(fixed)],
                    baseline_is="fixed shares",
                    unit="steps",
                    ratio_is="ours / baseline",
                )
            )
    return found


def _longest(rollouts: list[list[int]]) -> float:
    return statistics.mean(max(steps) for steps in rollouts)


def _idle(rollouts: list[list[int]]) -> float:
    """Return the mean number of steps for which an engine waits for the engine that ends last."""
    return statistics.mean(max(steps) - statistics.mean(steps) for steps in rollouts)
