"""Compute the advantages of IGPO and of A2TGPO for the same recorded trajectories, with the trainer's own functions.

Each step is computed separately, because a trainer normalises within the groups of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.record.rollout_files import read_records, recorded_steps
from a2tgpo.trajectory import Trajectory, from_dict

RESCALED = AlgorithmConfig(advantage="turn_group", gamma=1.0, alpha=1.0, rescale=True)
SUMMED = AlgorithmConfig(advantage="turn_group", gamma=1.0, alpha=1.0, rescale=False)
IGPO = AlgorithmConfig(advantage="igpo_joint", gamma=1.0)
GRPO = AlgorithmConfig(advantage="grpo")

MAX_NEEDLESS = 3
"""Largest number of needless searches that is counted separately. Larger numbers are counted together with it."""
OUTCOMES = {"right": 1.0, "wrong": 0.0, "ill-formed": -1.0}

MIN_SAMPLES = 30
"""`drifts` uses only turn indices that have at least this many values."""
PERCENTILES = (5, 25, 50, 75, 95)

Columns = dict[str, np.ndarray]
"""{name: column}. All columns have the same length. Counts and indices (turn, remaining, tool_calls) are int64.
Signals are float64."""


def spread_out(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of `steps`, equally spaced from the first to the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, count)]


def read_step(run_dir: Path, step: int) -> list[Trajectory]:
    """Return the trajectories that the run in `run_dir` trained on in one step."""
    records = read_records(recorded_steps(run_dir)[step])
    # `from_dict` ignores the advantages and texts that each record also has.
    return [from_dict(record) for record in records]


def table_of(trajectories: Sequence[Trajectory]) -> TurnTable:
    return build_turn_table(
        trajectories,
        num_prompts=max(t.prompt_index for t in trajectories) + 1,
        max_turns=max(1, *(t.num_process_turns for t in trajectories)),
    )


def gain_signals(trajectories: Sequence[Trajectory]) -> Columns:
    """Return a row for every process turn of one step that has a gain: its turn index (from 1) and its signals."""
    table = table_of(trajectories)
    has_gain = table.has_gain
    igpo, grouped = (compute_advantages(table, config, dp_group=None) for config in (IGPO, RESCALED))
    signals = {
        "raw gain": table.info_gain,
        "IGPO gain": igpo.normalized_gain,
        "A2TGPO gain": grouped.normalized_gain,
        "IGPO advantage": igpo.advantages[:, :-1],
        "A2TGPO advantage": grouped.advantages[:, :-1],
    }
    _, column = has_gain.nonzero(as_tuple=True)
    return {"turn": column.numpy() + 1} | {name: value[has_gain].numpy() for name, value in signals.items()}


def envelope_signals(trajectories: Sequence[Trajectory]) -> Columns:
    """Return a row for every turn of one step.

    The column `remaining` is the number of process turns from this turn (included) to the last. The other columns are
    advantages.
    """
    table = table_of(trajectories)
    column = torch.arange(table.max_turns + 1)
    # A response that a limit cut off right after an observation has no final turn.
    present = column < torch.tensor([len(t.turns) for t in trajectories])[:, None]  # [N, T + 1]
    remaining = table.num_process_turns[:, None] - column
    configs = {"sum": SUMMED, "rescaled": RESCALED, "IGPO": IGPO}
    results: dict[str, TurnAdvantages] = {
        name: compute_advantages(table, config, dp_group=None) for name, config in configs.items()
    }
    return {"remaining": remaining[present].numpy()} | {
        name: result.advantages[present].numpy() for name, result in results.items()
    }


def call_signals(trajectories: Sequence[Trajectory]) -> Columns:
    """Return a row for every trajectory, with the columns `tool_calls` and `em` (exact match)."""
    return {
        "tool_calls": np.array([t.num_process_turns for t in trajectories], dtype=np.int64),
        "em": np.array([t.exact_match for t in trajectories], dtype=np.float64),
    }


def needless_signals(trajectories: Sequence[Trajectory]) -> Columns:
    """Return a row for every trajectory that has at least as many searches as its question needs.

    The column `needless` is the number of needless searches. Each method's column is the mean advantage over the
    trajectory's sampled tokens.
    """
    table = table_of(trajectories)
    num_tokens = torch.zeros(len(trajectories), table.max_turns + 1, dtype=torch.float64)
    for row, trajectory in enumerate(trajectories):
        for column, turn in enumerate(trajectory.turns):
            num_tokens[row, column] = len(turn.tokens)
    share = num_tokens / num_tokens.sum(dim=1, keepdim=True).clamp(min=1)
    needless = table.num_process_turns - torch.tensor([t.hops for t in trajectories])
    known = (needless >= 0) & torch.tensor([t.hops > 0 for t in trajectories])
    columns = {
        "needless": needless[known].clamp(max=MAX_NEEDLESS).numpy(),
        "reward": table.outcome[known].numpy(),
    }
    for name, config in {"IGPO": IGPO, "A2TGPO": RESCALED, "GRPO": GRPO}.items():
        advantages = compute_advantages(table, config, dp_group=None).advantages
        columns[name] = (share * advantages).sum(dim=1)[known].numpy()
    return columns


def join(parts: Sequence[Columns]) -> Columns:
    """Return the rows of all `parts`, concatenated column by column."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def distributions(columns: Mapping[str, np.ndarray], by: str) -> Iterator[dict]:
    """Yield a row for every signal and every value in the column `by`: count, mean, spread and percentiles."""
    for name, values in columns.items():
        if name == by:
            continue
        for place in np.unique(columns[by]):
            own = values[columns[by] == place]
            yield {
                "signal": name,
                by: int(place),
                "count": len(own),
                "mean": float(own.mean()),
                "std": float(own.std()),
                **{f"p{p}": float(np.percentile(own, p)) for p in PERCENTILES},
            }


def drifts(rows: Sequence[Mapping]) -> list[dict]:
    """Return how much each signal's mean changes with the turn index, from the rows of `distributions`.

    In each row, `turns` lists the turn indices that have at least `MIN_SAMPLES` values. `drift` is the largest minus
    the smallest mean at these indices, or None for fewer than two indices.
    """
    found = []
    for name in dict.fromkeys(row["signal"] for row in rows):
        own = [row for row in rows if row["signal"] == name and row["count"] >= MIN_SAMPLES]
        means = [row["mean"] for row in own]
        found.append(
            {
                "signal": name,
                "drift": max(means) - min(means) if len(own) > 1 else None,
                "turns": " ".join(str(row["turn"]) for row in own),
                "min_samples": MIN_SAMPLES,
            }
        )
    return found
