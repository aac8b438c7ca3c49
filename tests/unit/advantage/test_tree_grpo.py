import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import z_score
from made_trees import computed, forests, rows_of, trajectories_of

quick = settings(max_examples=60)


def tree_grpo(trajectories, **fields) -> list[float]:
    """Return the advantage of each trajectory, which is that of all its turns."""
    rows = rows_of(computed(trajectories, "tree_grpo", **fields).advantages, trajectories)
    assert all(len(set(row)) == 1 for row in rows)
    return [row[0] for row in rows]


def roots(trajectories) -> list[tuple[int, int]]:
    """Return the prompt and the root of each trajectory, found by walking from parent to parent."""
    by_place = {(t.prompt_index, t.sample_index): t for t in trajectories}
    found = []
    for trajectory in trajectories:
        while trajectory.branch is not None:
            trajectory = by_place[trajectory.prompt_index, trajectory.branch.parent]
        found.append((trajectory.prompt_index, trajectory.sample_index))
    return found


def of_trees(leaves):
    """Return trajectories that all have a final turn."""
    return trajectories_of([dataclasses.replace(leaf, final=True) for leaf in leaves])


@quick
@given(forests(), st.booleans())
def test_advantages_equal_the_plain_loops(leaves, by_std):
    trajectories = of_trees(leaves)
    trees = roots(trajectories)
    expect = []
    for t, tree in zip(trajectories, trees, strict=True):
        in_tree = [o.outcome_reward for o, other in zip(trajectories, trees, strict=True) if other == tree]
        in_prompt = [o.outcome_reward for o in trajectories if o.prompt_index == t.prompt_index]
        expect.append(
            sum(
                z_score(t.outcome_reward, group, by_std=by_std, sample=True) for group in (in_tree, in_prompt)
            )
        )
    assert tree_grpo(trajectories, normalize_by_std=by_std) == pytest.approx(expect, rel=0, abs=1e-10)


@quick
@given(forests(branches=False))
def test_trees_of_one_trajectory_are_grpo(leaves):
    trajectories = of_trees(leaves)
    grpo = computed(trajectories, "grpo").advantages
    assert computed(trajectories, "tree_grpo").advantages.equal(grpo)


@quick
@given(forests(prompts=1))
def test_a_single_tree_is_twice_grpo(leaves):
    leaves = [dataclasses.replace(leaf, parent=place and 0) for place, leaf in enumerate(leaves)]
    trajectories = of_trees([dataclasses.replace(leaves[0], parent=None), *leaves[1:]])
    grpo = rows_of(computed(trajectories, "grpo").advantages, trajectories)
    assert tree_grpo(trajectories) == pytest.approx([2 * row[0] for row in grpo], rel=0, abs=1e-12)


@quick
@given(forests())
def test_within_a_tree_the_advantages_beyond_grpos_add_up_to_nothing(leaves):
    trajectories = of_trees(leaves)
    grpo = rows_of(computed(trajectories, "grpo").advantages, trajectories)
    sums: dict = {}
    for tree, both, own in zip(roots(trajectories), tree_grpo(trajectories), grpo, strict=True):
        sums[tree] = sums.get(tree, 0.0) + both - own[0]
    assert list(sums.values()) == pytest.approx([0.0] * len(sums), abs=1e-10)
