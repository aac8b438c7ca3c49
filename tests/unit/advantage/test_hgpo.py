import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import z_score

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Call, Trajectory, Turn

MAX_TURNS = 4
quick = settings(max_examples=60)
rollouts = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(
            st.sampled_from("ab"), max_size=MAX_TURNS
        ),  # few queries, so that rollouts reach equal states
        st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        st.booleans(),
    ),
    min_size=1,
    max_size=10,
)


def hgpo(items, **fields) -> torch.Tensor:
    made = []
    for sample, (prompt, queries, outcome, final) in enumerate(items):
        turns = [
            Turn(
                tokens=[1],
                rollout_logprobs=[0.0],
                calls=[Call(tool="search", arguments=query)],
                observation_tokens=[ord(query)],
            )
            for query in queries
        ]
        turns += [Turn(tokens=[2], rollout_logprobs=[0.0])] * (final or not turns)
        made.append(
            Trajectory(
                prompt_index=prompt,
                prompt_id="",
                sample_index=sample,
                prompt_tokens=[0],
                turns=turns,
                stop_reason="answer",
                outcome_reward=outcome,
            )
        )
    table = build_turn_table(made, num_prompts=2, max_turns=MAX_TURNS)
    config = AlgorithmConfig(**{"advantage": "hgpo", "gamma": 0.5, **fields})
    return compute_advantages(table, config, dp_group=None).advantages


def reference(items, *, gamma, alpha, history, by_std) -> list[list[float]]:
    """Return the result of the equations in the method's docstring, computed with loops, with the states themselves
    as keys.
    """
    states, values = [], []
    for prompt, queries, outcome, final in items:
        num_turns = len(queries) + (final or not queries)
        states.append([(prompt, "start"), *((prompt, query) for query in queries)][:num_turns])
        values.append([gamma ** (num_turns - 1 - t) * outcome for t in range(num_turns)])
    places = [(i, t) for i, row in enumerate(states) for t in range(len(row))]
    advantages = [[0.0] * (MAX_TURNS + 1) for _ in items]
    for i, t in places:
        total = weights = 0.0
        for k in range(1, min(history + 1, t + 1) + 1):
            own = states[i][t - k + 1 : t + 1]
            group = [values[j][u] for j, u in places if u + 1 >= k and states[j][u - k + 1 : u + 1] == own]
            if len(group) > 1:
                weights += (k + 1) ** alpha
                total += (k + 1) ** alpha * z_score(values[i][t], group, by_std=by_std)
        advantages[i][t] = total / weights if weights else 0.0
    return advantages


@quick
@given(
    rollouts,
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 6]),
    st.booleans(),
)
def test_advantages_equal_the_plain_loops(items, gamma, alpha, history, by_std):
    got = hgpo(items, gamma=gamma, alpha=alpha, hgpo_history=history, normalize_by_std=by_std)
    expect = reference(items, gamma=gamma, alpha=alpha, history=history, by_std=by_std)
    torch.testing.assert_close(got, torch.tensor(expect, dtype=torch.float64), rtol=0, atol=1e-10)


@quick
@given(rollouts)
def test_without_history_it_is_the_step_part_of_gigpo(items):
    own = hgpo(items, hgpo_history=0, normalize_by_std=False)
    both, episode = (
        hgpo(items, advantage="gigpo", alpha=alpha, normalize_by_std=False) for alpha in (1.0, 0.0)
    )
    torch.testing.assert_close(own, both - episode, rtol=0, atol=1e-12)


@quick
@given(rollouts, st.sampled_from([0.0, 1.0, 3.0]))
def test_the_weights_do_not_matter_if_all_rollouts_have_the_same_history(items, alpha):
    items = [(0, list("abc"), outcome, True) for _, _, outcome, _ in items]
    got, flat = hgpo(items, alpha=alpha, gamma=1.0), hgpo(items, alpha=0.0, gamma=1.0)
    torch.testing.assert_close(got, flat, rtol=0, atol=1e-12)


def test_a_longer_equal_history_weighs_more_and_a_lonely_turn_has_no_advantage():
    rows = [("ab", 1.0), ("ab", 0.0), ("b", 0.0), ("ax", 1.0)]
    items = [(0, list(queries), outcome, True) for queries, outcome in rows]
    got = hgpo(items, gamma=1.0, hgpo_history=1, normalize_by_std=False)
    # The last turn of the first rollout has outcome 1. Its group after `b` has outcomes (1, 0, 0) and weight 2. Its
    # group after `a`, `b` has outcomes (1, 0) and weight 3.
    assert got[0, 2].item() == pytest.approx((2 * 2 / 3 + 3 * 1 / 2) / 5, abs=1e-12)
    assert got[3, 2].item() == 0.0
