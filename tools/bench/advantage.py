"""Measure how fast the trainer computes the advantages of 1,024 trajectories, compared with loops over tokens.

Each trajectory has 2,000 tokens. The loops implement Eq. 6-9 of the paper. One loop reads tensors, as in trainers
with rewards per token, and the other reads Python lists. All variants give every sampled token the same advantage.
The bench then measures the trainer's time for four times the trajectories, for twice the turns, and on two and four
processes. The bench counts the bytes of the processes' messages, and extrapolates the number to 1,024 ranks.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from trajectories import GROUP_SIZE, make_trajectories

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.parallel import collectives
from a2tgpo.trajectory import Trajectory

COUNT, TOKENS, TURNS = 1024, 2000, 6
CONFIG = AlgorithmConfig()
VARIANCE_FLOOR, EPS = 1e-8, 1e-6


def rows() -> list[measure.Row]:
    trajectories = make(COUNT)
    place = Placement(trajectories)
    gains, turns = per_token_records(trajectories)
    gain_tensors = [torch.tensor(row, dtype=torch.float64) for row in gains]
    turn_tensors = [torch.tensor(row) for row in turns]

    def vectorised() -> torch.Tensor:
        return vectorised_advantages(trajectories, place)

    def over_tensors() -> list[torch.Tensor]:
        out = [torch.zeros(len(row), dtype=torch.float64) for row in turn_tensors]
        return loop_over_tokens(trajectories, gain_tensors, turn_tensors, out)

    def over_lists() -> list[list[float]]:
        return loop_over_tokens(trajectories, gains, turns, [[0.0] * len(row) for row in turns])

    ours = vectorised()
    for loop in (over_lists(), over_tensors()):
        flat = torch.cat([torch.as_tensor(row, dtype=torch.float64) for row in loop])
        torch.testing.assert_close(flat[place.is_sampled], ours, rtol=1e-9, atol=1e-9)
    seconds = measure.interleaved(
        {"ours": vectorised, "tensors": over_tensors, "lists": over_lists}, rounds=3, warm_up=False
    )
    size = f"{COUNT:,} trajectories × {TOKENS:,} tokens"
    peaks = {name: measure.peak_megabytes(f) for name, f in (("ours", vectorised), ("tensors", over_tensors))}
    return [
        measure.compared(
            f"advantages, {size}",
            seconds["ours"],
            seconds["tensors"],
            baseline_is="loop over tokens in tensors",
            unit="CPU s",
            target=">= 200",
        ),
        measure.compared(
            f"advantages, {size}",
            seconds["ours"],
            seconds["lists"],
            baseline_is="loop over tokens in Python lists",
            unit="CPU s",
        ),
        measure.compared(
            f"peak memory of the same, {size}",
            [peaks["ours"]],
            [peaks["tensors"]],
            baseline_is="loop over tokens in tensors",
            unit="MB",
        ),
        *growth(trajectories),
    ]


def make(count: int, turns: int = TURNS) -> list[Trajectory]:
    return make_trajectories(count, mean_tokens=TOKENS, spread=0.0, max_turns=turns)


# -- ours ----------------------------------------------------------------------------------------------------


class Placement:
    """The turn and trajectory of every sampled token, flat over all trajectories, as packing provides them."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        turns = [torch.tensor(row) for row in per_token_records(trajectories)[1]]
        self.is_sampled = torch.cat(turns) >= 0
        self.turn = torch.cat(turns)[self.is_sampled]
        lengths = torch.tensor([len(row) for row in turns])
        self.trajectory = torch.repeat_interleave(torch.arange(len(turns)), lengths)[self.is_sampled]


def vectorised_advantages(trajectories: Sequence[Trajectory], place: Placement) -> torch.Tensor:
    """Return the advantages [sampled tokens], computed with the trainer's own functions."""
    table = build_turn_table(trajectories, num_prompts=len(trajectories) // GROUP_SIZE, max_turns=TURNS)
    return compute_advantages(table, CONFIG, dp_group=None).advantages[place.trajectory, place.turn]


# -- the loops -----------------------------------------------------------------------------------------------


def per_token_records(trajectories: Sequence[Trajectory]) -> tuple[list[list[float]], list[list[int]]]:
    """Return two lists with a row per trajectory and a value per token.

    The first list has each turn's gain at the last token of the turn's observation, else NaN. The second list has the
    turn index at sampled tokens, else -1.
    """
    gains, turns = [], []
    for trajectory in trajectories:
        gain_row, turn_row = [math.nan] * len(trajectory.prompt_tokens), [-1] * len(trajectory.prompt_tokens)
        for number, turn in enumerate(trajectory.turns):
            gain_row += [math.nan] * (len(turn.tokens) + len(turn.observation_tokens))
            turn_row += [number] * len(turn.tokens) + [-1] * len(turn.observation_tokens)
            if turn.info_gain is not None:
                gain_row[-1] = turn.info_gain
        gains.append(gain_row)
        turns.append(turn_row)
    return gains, turns


def loop_over_tokens(
    trajectories: Sequence[Trajectory], gain_at: Sequence, turn_at: Sequence, advantage_at: list
) -> list:
    """Write the advantages of Eq. 6-9 into `advantage_at`, token by token. The rows are lists or tensors."""
    buckets: dict[tuple[int, int], list[float]] = defaultdict(list)
    outcomes: dict[int, list[float]] = defaultdict(list)
    gains: list[list[float]] = []
    for trajectory, row in zip(trajectories, gain_at, strict=True):
        found: list[float] = []
        for position in range(len(row)):
            gain = float(row[position])
            if not math.isnan(gain):
                buckets[trajectory.prompt_index, len(found)].append(gain)
                found.append(gain)
        gains.append(found)
        outcomes[trajectory.prompt_index].append(trajectory.outcome_reward)
    for trajectory, found, turns, out in zip(trajectories, gains, turn_at, advantage_at, strict=True):
        prompt = trajectory.prompt_index
        outcome = z_score(trajectory.outcome_reward, outcomes[prompt])
        of_turn, running = [outcome], 0.0
        for turn in reversed(range(len(found))):
            running = z_score(found[turn], buckets[prompt, turn]) + CONFIG.gamma * running
            of_turn.insert(0, CONFIG.alpha * running / math.sqrt(len(found) - turn) + outcome)
        for position in range(len(turns)):
            turn = int(turns[position])
            if turn >= 0:
                out[position] = of_turn[turn]
    return advantage_at


def z_score(value: float, group: Sequence[float]) -> float:
    if len(group) == 1:
        return 0.0
    mean = sum(group) / len(group)
    variance = sum((member - mean) ** 2 for member in group) / len(group)
    return (value - mean) / (math.sqrt(variance + VARIANCE_FLOOR) + EPS)


# -- growth --------------------------------------------------------------------------------------------------


def growth(trajectories: list[Trajectory]) -> list[measure.Row]:
    many, long = make(4 * COUNT), make(COUNT, turns=2 * TURNS)

    def through(batch: list[Trajectory], turns: int) -> None:
        table = build_turn_table(batch, num_prompts=len(batch) // GROUP_SIZE, max_turns=turns)
        compute_advantages(table, CONFIG, dp_group=None)

    seconds = measure.interleaved(
        {
            "one": lambda: through(trajectories, TURNS),
            "many": lambda: through(many, TURNS),
            "long": lambda: through(long, 2 * TURNS),
        },
        rounds=5,
    )
    by_ranks = {ranks: on_ranks(ranks) for ranks in (1, 2, 4)}
    slowest = {ranks: [max(times) for times in zip(*by_ranks[ranks][0], strict=True)] for ranks in by_ranks}
    message = by_ranks[4][1]
    assert message == by_ranks[2][1], "a message grows with the ranks"
    # In a ring all-reduce over n ranks, a rank sends 2 (n - 1) / n times the message. In an all-gather, a rank passes
    # on the values of n - 1 ranks.
    to_1024 = 2 * 1023 / 1024 * message
    gathered = 1023 / 1024 * COUNT * TOKENS * 4
    shared = dict(unit="CPU s", ratio_is="ours / baseline")
    return [
        measure.compared(
            f"growth: {4 * COUNT:,} trajectories",
            seconds["many"],
            seconds["one"],
            baseline_is=f"{COUNT:,} trajectories",
            **shared,
        ),
        measure.compared(
            f"growth: up to {2 * TURNS} tool calls",
            seconds["long"],
            seconds["one"],
            baseline_is=f"up to {TURNS}",
            **shared,
        ),
        *(
            measure.compared(
                f"growth: {ranks} processes with 1/{ranks} of the trajectories each, the slowest",
                slowest[ranks],
                slowest[1],
                baseline_is="1 process",
                note="all-reduces by gloo",
                **shared,
            )
            for ranks in (2, 4)
        ),
        measure.compared(
            "bytes that a rank sends at 1,024 ranks",
            [to_1024],
            [gathered],
            baseline_is="gathering float32 rewards per token",
            unit="bytes",
            note=f"computed; messages of {message:,} bytes counted at 2 and at 4 ranks",
        ),
    ]


def on_ranks(num_ranks: int, rounds: int = 5) -> tuple[list[list[float]], int]:
    """Run `num_ranks` processes. Return CPU seconds [rank][round], and the bytes a rank all-reduces per round."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(num_ranks, rounds, folder), nprocs=num_ranks)
        parts = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(num_ranks)]
    return [times for times, _ in parts], parts[0][1]


def _rank(rank: int, num_ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    own = [t for t in make(COUNT) if t.sample_index % num_ranks == rank]
    sent, all_reduce = [], collectives._all_reduce

    def counted(tensor: torch.Tensor, op: object, group: dist.ProcessGroup) -> torch.Tensor:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, op, group)

    collectives._all_reduce = counted
    times = []
    for _ in range(rounds + 1):
        sent.clear()
        dist.barrier()
        start = time.process_time()
        table = build_turn_table(own, num_prompts=COUNT // GROUP_SIZE, max_turns=TURNS)
        compute_advantages(table, CONFIG, dp_group=dist.group.WORLD)
        times.append(time.process_time() - start)
    torch.save((times[1:], sum(sent)), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
