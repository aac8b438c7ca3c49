"""Play rank 0 of RANKS ranks in a single process, and print one record as JSON. scale.py starts this program.

python tools/bench/scale_rank.py RANKS
"""

from __future__ import annotations

import gc
import json
import math
import pickle
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from a2tgpo.batch.exchange import exchange
from a2tgpo.config.load import load_config
from a2tgpo.data.question_set import Question
from a2tgpo.data.template import PromptSet, PromptTemplate
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.launch.open_files import FILES_PER_RANK
from a2tgpo.launch.rank_facts import RankFacts, compare
from a2tgpo.metrics.host_memory import resident_bytes
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.metrics.slow_ranks import SlowRanks
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.engine_group import build_engine_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import lay_out
from a2tgpo.record.rollout_record import as_text, to_record
from a2tgpo.record.rollout_summary import best_and_worst, gains_by_turn, gather_summaries, gather_texts
from a2tgpo.record.rollout_writer import RolloutWriter
from a2tgpo.trajectory import Call, LogProbs, TokenIds, Trajectory, Turn

MODEL = "artifacts/models/smollm2-135m"
PROMPTS, GROUP_SIZE, TOKENS, TURNS = 128, 8, 8192, 6
PROMPTS_PER_MINIBATCH = 16
NUM_METRICS, NUM_STAGES, NUM_QUESTIONS, NUM_TEXTS = 100, 10, 20_000, 8
ENGINE_RANKS = 8
ROUNDS = 3


class Peers:
    """Simulates the other ranks: collectives make the parts of all other ranks from this rank's own part."""

    def __init__(self) -> None:
        self.calls = self.sent = self.received = 0
        self.made: Counter[str] = Counter()
        self.of_peer: Callable[[int, Any], Any] = lambda rank, own: own
        """Returns another rank's part, given that rank's number and this rank's own part."""

    def patches(self) -> list[Any]:
        names = (
            "all_gather_object",
            "gather_object",
            "all_gather",
            "all_to_all_single",
            "broadcast",
            "all_reduce",
        )
        return [mock.patch.object(dist, name, getattr(self, name)) for name in names] + [
            mock.patch.object(dist, "new_group", self._counting(dist.new_group))
        ]

    def _counting(self, new_group: Callable[..., Any]) -> Callable[..., Any]:
        def made(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
            self.made["all"] += 1
            self.made["own"] += ranks is None or 0 in ranks
            return new_group(ranks, **{"timeout": kwargs.get("timeout"), "backend": "fake"})

        return made

    def all_gather_object(self, values: list[Any], value: Any, group: Any = None) -> None:
        self._gather(values, value)

    def gather_object(self, value: Any, values: list[Any] | None, group: Any, group_dst: int) -> None:
        if values is not None:
            self._gather(values, value)

    def _gather(self, values: list[Any], value: Any) -> None:
        self.calls += 1
        for rank in range(len(values)):
            content = pickle.dumps(self.of_peer(rank, value) if rank else value)
            self.received += len(content)
            values[rank] = pickle.loads(content)

    def all_gather(self, values: list[torch.Tensor], value: torch.Tensor, group: Any = None) -> None:
        self.calls += 1
        for rank, place in enumerate(values):
            place.copy_(self.of_peer(rank, value) if rank else value)

    def all_to_all_single(
        self, output: torch.Tensor, given: torch.Tensor, incoming: list[int], outgoing: list[int], group: Any
    ) -> None:
        self.calls += 1
        self.sent += given.numel()
        for part in output.split(incoming):
            part.copy_(given[: part.numel()])

    def broadcast(self, tensor: torch.Tensor, **_: Any) -> None:
        self.calls += 1
        self.sent += tensor.numel() * tensor.element_size()

    def all_reduce(self, tensor: torch.Tensor, **_: Any) -> None:
        self.calls += 1


def main(size: int) -> None:
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    peers = Peers()
    for patch in peers.patches():
        patch.start()
    record: dict[str, Any] = {"files": FILES_PER_RANK * size}
    before, start = resident_bytes(), time.process_time()
    layout = ["parallel.tensor=8", f"parallel.pipeline={4 if size >= 64 else 1}"]
    config = load_config("configs/train_70b.yaml", layout)
    groups = lay_out(config.parallel, seed=0)
    build_engine_group(config, groups)
    record["groups_s"] = time.process_time() - start
    record["groups"] = [peers.made["all"], peers.made["own"]]
    record["host_mb"] = (resident_bytes() - before) / 1e6
    record["facts_s"] = seconds_of(lambda: compare(facts_of(size), {"model.path": "m"}))
    tokenizer = load_tokenizer(MODEL)
    prompts = questions(PromptTemplate(tokenizer, ""))
    record["questions_s"] = seconds_of(lambda: prompts.first_too_long(slice(0, None, size)), rounds=1)
    engines = size // ENGINE_RANKS
    played = [t for p in range(0, PROMPTS, engines) for t in group_of(p, len(tokenizer))]
    record |= measure_exchange(peers, groups, played, engines)
    trained = [t for p in range(PROMPTS) for t in group_of(p, len(tokenizer))][:: groups.dp_size]
    record |= measure_record(peers, groups, trained, tokenizer)
    record["step_s"] = record["exchange_s"] + record["metrics_s"] + record["record_s"]
    print(json.dumps(record))


def measure_exchange(
    peers: Peers, groups: ParallelGroups, played: list[Trajectory], engines: int
) -> dict[str, float]:
    def of_peer(rank: int, own: Any) -> Any:
        if rank % ENGINE_RANKS:
            return [] if isinstance(own, list) else torch.zeros_like(own)
        if not isinstance(own, list):
            return own
        engine = rank // ENGINE_RANKS
        # Give the trajectories different lengths, because otherwise the first replica would receive all of them.
        return [
            (p + engine, s, n + (37 * engine + 11 * s + p) % 101) for p, s, n in own if p + engine < PROMPTS
        ]

    peers.of_peer, peers.calls, peers.sent = of_peer, 0, 0
    play = lambda: exchange(played, groups, prompts_per_minibatch=PROMPTS_PER_MINIBATCH)  # noqa: E731
    play()
    counted = {"exchange_calls": peers.calls, "exchange_mb": peers.sent / 1e6}
    return {"exchange_s": seconds_of(play), **counted}


def measure_record(
    peers: Peers, groups: ParallelGroups, trained: list[Trajectory], tokenizer: Any
) -> dict[str, float]:
    sums, seconds = MetricSums(), {f"time/stage_{i}_s": i + 0.1 for i in range(NUM_STAGES)}
    for number in range(NUM_METRICS):
        sums.add(f"topic/metric_number_{number}", math.pi * number, 1)
    world = world_group()
    slow_ranks = SlowRanks(ratio=2.0, steps=3)

    def metrics() -> None:
        sums.reduce(world)
        slow_ranks.compare(all_gather_object(seconds, world))

    values = {name: torch.rand(len(trained), TURNS + 1) for name in ("advantage", "clip_scale", "ratio")}
    waited = []
    with tempfile.TemporaryDirectory() as folder:
        writer = RolloutWriter(Path(folder), replica=0, num_replicas=groups.dp_size, tokenizer=tokenizer)

        def record() -> None:
            start = time.process_time()
            summaries = gather_summaries(trained, groups)
            gains_by_turn(summaries)
            chosen = best_and_worst(summaries, NUM_TEXTS)
            gather_texts(
                chosen,
                trained,
                lambda row: as_text(to_record(trained[row], values, row, tokenizer=tokenizer)),
                groups,
            )
            waited.append(time.process_time() - start)
            writer.start(1, trained, values)
            writer.wait()

        peers.of_peer, peers.calls, peers.received = lambda rank, own: own, 0, 0
        metrics()
        received = peers.received
        record()
        calls = peers.calls
        metrics_s = seconds_of(metrics)
        seconds_of(record)
    return {
        "metrics_s": metrics_s,
        "metrics_kb": received / 1e3,
        "record_s": min(waited),
        "record_calls": calls,
    }


def seconds_of(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Run `action` in `rounds` rounds, and return the CPU seconds of the fastest round."""
    found = []
    for _ in range(rounds):
        gc.collect()
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found)


def facts_of(size: int) -> list[RankFacts]:
    equal = {f"package {number}": "1.2.3" for number in range(20)}
    return [
        RankFacts(rank=r, host=f"node{r // 8}", equal=equal, paths={"model.path": "abc"}, gpu=f"GPU-{r}")
        for r in range(size)
    ]


def questions(template: PromptTemplate) -> PromptSet:
    text = (
        "Which of the rivers that flow through the capital of the country number {} is the longest one? " * 6
    )
    members = [
        Question(id=str(number), question=text.format(*[number] * 6), answers=("a",))
        for number in range(NUM_QUESTIONS)
    ]
    return PromptSet(members, template, max_prompt_tokens=1000)


def group_of(prompt: int, vocab_size: int) -> list[Trajectory]:
    rng = random.Random(prompt)

    def ids(count: float) -> TokenIds:
        return TokenIds(rng.choices(range(vocab_size), k=max(1, int(count))))

    made = []
    for sample in range(GROUP_SIZE):
        length = rng.gauss(TOKENS, TOKENS / 4) / (TURNS + 1)
        turns = [
            Turn(
                tokens=(written := ids(0.4 * length)),
                rollout_logprobs=LogProbs([-0.5] * len(written)),
                observation_tokens=ids(0.6 * length),
                calls=[Call(tool="search", arguments="q")] if turn < TURNS else [],
                info_gain=rng.random() if turn < TURNS else None,
            )
            for turn in range(TURNS + 1)
        ]
        made.append(
            Trajectory(
                prompt_index=prompt,
                prompt_id=str(prompt),
                sample_index=sample,
                prompt_tokens=ids(150),
                turns=turns,
                stop_reason="answer",
                outcome_reward=float(rng.random() < 0.5),
            )
        )
    return made


if __name__ == "__main__":
    main(int(sys.argv[1]))
