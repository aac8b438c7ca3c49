"""APPO's advantage (arXiv:2606.12384): GRPO's advantage, plus the outcomes of the branches that share a token.

    A_{i,k} = z(R_i) + mean over the inner branches b of trajectory i that share token k of z_b(R_b)

z is GRPO's z-score of the outcome among the prompt's trajectories, without inner branches, and z_b is that of a
branch's outcome among all inner branches of the prompt. z_b of a single branch is 0. The mean over no branches is 0.

Decisions where paper and authors' code differ:
- This module adds the two terms, as the code does. The paper averages them.
- This module uses the sample standard deviation, so that a prompt without inner branches has exactly GRPO's
  advantages. The code uses the population standard deviation.

Inner branches whose reward failed are left out, and so are those of a trajectory whose own reward failed.
"""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import place_turns
from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.grpo_outcome import grpo_outcome
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Trajectory


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the mean advantage of each turn, and the tokens' deviations from it. Gains are not used."""
    judged = [[b for b in t.inner_branches if b.reward_error is None] for t in table.trajectories]
    rows = torch.tensor([row for row, own in enumerate(judged) for _ in own], dtype=torch.int64)
    outcomes = torch.tensor([b.outcome_reward for own in judged for b in own], dtype=torch.float64)
    outcome = grpo_outcome(table, config, dp_group=dp_group)
    scores = normalize_groups(
        outcomes,
        table.prompt_index[rows],
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
    )
    no_gain = torch.zeros_like(table.info_gain)
    of_turns = place_turns(no_gain, outcome, table.num_process_turns)
    offsets = [
        branch_worth(trajectory, branches, worth)
        for trajectory, branches, worth in zip(
            table.trajectories, judged, scores.split([len(own) for own in judged]), strict=True
        )
    ]
    for row, trajectory in enumerate(table.trajectories):
        _move_means(offsets[row], of_turns[row], trajectory)
    return TurnAdvantages(
        advantages=of_turns,
        normalized_gain=no_gain,
        normalized_outcome=outcome,
        token_offsets=offsets,
    )


def branch_worth(trajectory: Trajectory, branches: list[Trajectory], worth: torch.Tensor) -> torch.Tensor:
    """Return for each sampled token the mean `worth` [B] of the B `branches` that share it, [L] float64."""
    shared = torch.tensor([branch.num_shared_tokens for branch in branches], dtype=torch.int64)
    shares = torch.arange(trajectory.num_sampled_tokens) < shared[:, None]  # [B, L]
    return (shares * worth[:, None]).sum(dim=0) / shares.sum(dim=0).clamp(min=1)


def _move_means(offsets: torch.Tensor, of_turns: torch.Tensor, trajectory: Trajectory) -> None:
    """For each turn, move the mean of its tokens' `offsets` [L] to its entry of `of_turns` [T + 1]."""
    start = 0
    for column, turn in enumerate(trajectory.turns):
        if turn.tokens:
            of_tokens = offsets[start : start + len(turn.tokens)]
            mean = of_tokens.mean()
            of_turns[column] += mean
            of_tokens -= mean
            start += len(turn.tokens)
