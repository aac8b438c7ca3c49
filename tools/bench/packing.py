"""Measure the share of real tokens in training micro-batches, and the time that packing takes.

Like a training step, the bench divides trajectories of 500 to 6,000 tokens into micro-batches on data-parallel
replicas. The layouts are those of the shipped configurations. The baselines pad every row to the longest row of the
micro-batch. One baseline keeps the order of the rollout, and the other sorts by length.
"""

from __future__ import annotations

from collections.abc import Sequence

import measure
from trajectories import make_trajectories

from a2tgpo.batch.balance import deal, microbatches
from a2tgpo.batch.packing import Alignment, alignment, pack, packed_length
from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.trajectory import Trajectory

COUNT, TOKENS = 128, 2400
"""Number of trajectories in one mini-batch (8 prompts × 16), and their mean number of tokens."""
LAYOUTS = {"train_4b": 8, "train_8b": 4, "train_70b": 2}
"""{configuration: its number of data-parallel replicas}."""


def packed_share(trajectories: Sequence[Trajectory], config: RunConfig, replicas: int) -> float:
    """Return the share of real tokens if every replica has as many positions as the largest replica."""
    align = alignment(config.parallel, config.model.fp8)
    limit = config.update.max_microbatch_tokens
    lengths = [packed_length(t) for t in trajectories]
    bins = deal([align.segment_length(length) for length in lengths], replicas)
    positions = []
    for replica in range(replicas):
        own = [i for i, dealt in enumerate(bins) if dealt == replica]
        groups = microbatches([align.segment_length(lengths[i]) for i in own], limit, row=align.row)
        batches = [pack(trajectories, [own[i] for i in group], align=align) for group in groups]
        positions.append(sum(batch.num_tokens for batch in batches))
    return sum(lengths) / (replicas * max(positions))


def padded_share(trajectories: Sequence[Trajectory], limit: int, *, by_length: bool) -> float:
    """Return the share of real tokens on one replica that pads rows to the longest row of their micro-batch."""
    lengths = [packed_length(t) for t in trajectories]
    if by_length:
        lengths.sort()
    positions, rows, longest = 0, 0, 0
    for length in lengths:
        if rows and (rows + 1) * max(longest, length) > limit:
            positions, rows, longest = positions + rows * longest, 0, 0
        rows, longest = rows + 1, max(longest, length)
    return sum(lengths) / (positions + rows * longest)


def rows() -> list[measure.Row]:
    made = [make_trajectories(COUNT, mean_tokens=TOKENS, spread=0.5, seed=seed) for seed in range(5)]
    found = []
    for name, replicas in LAYOUTS.items():
        config = load_config(f"configs/{name}.yaml")
        limit = config.update.max_microbatch_tokens
        ours = [packed_share(trajectories, config, replicas) for trajectories in made]
        for by_length, words in ((False, "padded, as rollouts come"), (True, "padded, sorted by length")):
            found.append(
                measure.compared(
                    f"share of real tokens, {name} on {replicas} replicas",
                    ours,
                    [padded_share(trajectories, limit, by_length=by_length) for trajectories in made],
                    baseline_is=words,
                    unit="of positions",
                    ratio_is="ours / baseline",
                    note="waiting for the longest replica included; noise: over five draws of lengths",
                )
            )
        lowest = min(ours)
        found.append(
            measure.compared(
                f"share of real tokens, {name} on {replicas} replicas, the worst of five draws",
                [lowest],
                [1.0],
                baseline_is="all positions",
                unit="of positions",
                ratio_is="ours / baseline",
                target=">= 0.97",
            )
        )
    trajectories = made[0]
    tokens = sum(t.num_tokens for t in trajectories)
    seconds = measure.interleaved(
        {
            "pack": lambda: pack(trajectories, range(COUNT), align=Alignment()),
            "copy": lambda: [
                list(t.prompt_tokens) + [x for u in t.turns for x in u.tokens] for t in trajectories
            ],
        },
        rounds=7,
    )
    found.append(
        measure.compared(
            f"packing {tokens:,} tokens",
            seconds["pack"],
            seconds["copy"],
            baseline_is="copying their lists once",
            unit="CPU s",
            ratio_is="ours / baseline",
        )
    )
    return found
