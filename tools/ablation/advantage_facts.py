"""Describe the advantages of several methods on the same trajectories, for tools/ablation/method_facts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from turn_signals import GRPO, IGPO, RESCALED, table_of

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.io.tables import markdown_table
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.record.advantage_metrics import add_advantage_metrics
from a2tgpo.trajectory import Trajectory

METHODS: Mapping[str, AlgorithmConfig] = {
    "grpo": GRPO,
    "igpo": IGPO,
    "igpo_separate": AlgorithmConfig(advantage="igpo_separate", gamma=1.0),
    "a2tgpo": RESCALED,
    "a2tgpo, spread at least 0.05": AlgorithmConfig(advantage="turn_group", gain_spread_floor=0.05),
    "turn_group_absent": AlgorithmConfig(advantage="turn_group_absent"),
}
OUTCOMES = {1.0: "all right", 0.0: "all wrong", -1.0: "all ill-formed"}


def facts(steps: Sequence[Sequence[Trajectory]], config: AlgorithmConfig) -> dict[str, float]:
    """Return {column: value}, the table's row for the method with the settings `config`.

    Gains and outcomes are normalised separately in each of `steps`, as in training. A column is missing if no
    trajectory has a value for it.
    """
    sums = MetricSums()
    for trajectories in steps:
        table = table_of(trajectories)
        result = compute_advantages(table, config, dp_group=None)
        add_advantage_metrics(sums, table, result, torch.ones_like(result.advantages))
        final = result.advantages.gather(1, table.last_turn[:, None])[:, 0]
        for prompt in table.prompt_index.unique():
            group = table.prompt_index == prompt
            outcomes = table.outcome[group].unique()
            if len(outcomes) == 1 and outcomes.item() in OUTCOMES:
                sums.add(OUTCOMES[outcomes.item()], final[group].sum().item(), int(group.sum()))
    found = sums.values()
    names = {"process turns": "advantage/process_mean", "narrow": "advantage/narrow_signal_share"}
    names |= {name: name for name in OUTCOMES.values()}
    return {column: found[name] for column, name in names.items() if name in found}


def equal_groups(steps: Sequence[Sequence[Trajectory]]) -> tuple[int, int]:
    """Return the number of groups whose rollouts all earned the same reward, and the number of all groups."""
    rewards = [
        {t.outcome_reward for t in trajectories if t.prompt_index == prompt}
        for trajectories in steps
        for prompt in {t.prompt_index for t in trajectories}
    ]
    return sum(len(values) == 1 for values in rewards), len(rewards)


def facts_text(steps: Sequence[Sequence[Trajectory]]) -> str:
    """Return the table of all methods as Markdown, below a line that counts the groups with equal rewards."""
    rows = []
    for name, config in METHODS.items():
        row = facts(steps, config)
        means = [
            f"{row[column]:+.3f}" if column in row else "" for column in ("process turns", *OUTCOMES.values())
        ]
        rows.append([name, *means, f"{row['narrow']:.1%}" if "narrow" in row else ""])
    equal, count = equal_groups(steps)
    table = markdown_table(["method", "process turns", *OUTCOMES.values(), "narrow"], rows)
    return (
        f"In {equal} of {count} groups ({equal / count:.0%}) all rollouts earned the same reward.\n\n{table}"
    )
