"""The metrics of inner branches, and the numbers of branches whose group a step takes."""

import pytest

from a2tgpo.collect.inner_branches import add_inner_branch_metrics
from a2tgpo.collect.step import take_groups
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.trajectory import Branch, Trajectory, Turn

OUTCOMES = {0: (1.0, 1.0), 1: (0.0, 0.0), 2: (1.0, 0.0), 3: (1.0, None), 4: (1.0, 0.0), 5: ()}
"""For each group, the outcomes of its branches. None: the reward failed."""


def trajectory(group: int, sample: int, num_tokens: int, **fields) -> Trajectory:
    turn = Turn(tokens=[1] * num_tokens, rollout_logprobs=[0.0] * num_tokens)
    return Trajectory(
        prompt_index=group,
        prompt_id=f"question {group}",
        sample_index=sample,
        prompt_tokens=[1],
        turns=[turn],
        stop_reason="answer",
        **fields,
    )


def played() -> list[Trajectory]:
    """Return groups of two trajectories with 8 tokens. Branch b shares 2 + b tokens with trajectory b of its group,
    and samples 3 more."""
    found = []
    for group, outcomes in OUTCOMES.items():
        members = [trajectory(group, sample, 8) for sample in range(2)]
        for place, (parent, outcome) in enumerate(zip(members, outcomes, strict=False)):
            branch = trajectory(
                group,
                2 + place,
                5 + place,
                branch=Branch(parent=place, root=place, owners=(), num_tokens=2 + place),
                outcome_reward=outcome or 0.0,
                reward_error="the judge is away" if outcome is None else None,
            )
            parent.inner_branches.append(branch)
        found += members
    return found


def test_branches_get_the_number_of_their_taken_group_and_no_other_change():
    before = played()
    taken = take_groups(before, [1, 2, 4])
    assert [t.prompt_index for t in taken] == [0, 0, 1, 1, 2, 2]
    for t in taken:
        assert [b.prompt_index for b in t.inner_branches] == [t.prompt_index]
        assert t.inner_branches[0].prompt_id == t.prompt_id
    assert [t.renumbered([1, 2, 4][t.prompt_index]) for t in taken] == [*before[2:6], *before[8:10]]
    assert before == played()


def test_the_metrics_of_branches_are_the_same_before_and_after_groups_are_taken():
    groups = [2, 3, 4, 5]
    for trajectories in (
        take_groups(played(), groups),
        [t for t in played() if t.prompt_index in groups],
    ):
        metrics = MetricSums()
        add_inner_branch_metrics(metrics, trajectories, per_prompt=2)
        assert metrics.values() == pytest.approx(
            {
                "branch/count": 6,
                "branch/unfilled": 2,
                "branch/mean_position": (2 + 3) / 2 / 8,
                "branch/sampled_tokens": 3,
                "branch/reward_mean": 3 / 5,
                "branch/equal_groups_share": 2 / 4,
            }
        )


def test_branches_of_a_trajectory_that_no_reward_judged_count_only_as_begun():
    """Of group 4, the parent of the branch with outcome 0 has no reward. Of group 1, no parent has one."""
    trajectories = [t for t in played() if t.prompt_index in (1, 2, 4)]
    for t in trajectories:
        if (t.prompt_index, t.sample_index) in ((1, 0), (1, 1), (4, 1)):
            t.reward_error = "the judge is away"
    metrics = MetricSums()
    add_inner_branch_metrics(metrics, trajectories, per_prompt=2)
    assert metrics.values() == pytest.approx(
        {
            "branch/count": 3,
            "branch/unfilled": 0,
            "branch/mean_position": (2 + 3 + 2) / 3 / 8,
            "branch/sampled_tokens": 3,
            "branch/reward_mean": 2 / 3,
            "branch/equal_groups_share": 1 / 2,
        }
    )
