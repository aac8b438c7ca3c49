"""The paper's Propositions 1 and 2 and Corollary 1 (arXiv:2605.06200, Appendix D), measured on simulated gains.

The gains are heterogeneous, as in a real run: ig_{i,t} = scale_q (MEANS_t + SPREADS_t x_{i,t}). Means and spreads
fall with the turn. Questions have different scales, and rollouts different depths. x has unit variance. Along a
rollout it is independent or AR(1). Prompts are independent, so standard errors are computed over prompts.
"""

import functools
import math

import pytest
import torch

from a2tgpo.advantage.accumulate import accumulate_process_turns
from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Call, Trajectory, Turn

NUM_PROMPTS, GROUP_SIZE, MAX_TURNS = 64, 96, 6
MEANS = torch.tensor([0.30, 0.16, 0.08, 0.03, 0.00, -0.02], dtype=torch.float64)
SPREADS = torch.tensor([0.22, 0.18, 0.15, 0.12, 0.10, 0.08], dtype=torch.float64)
DEPTH_SHARES = torch.tensor([0.05, 0.10, 0.15, 0.20, 0.20, 0.30], dtype=torch.float64)
"""Shares of rollouts with 1 to MAX_TURNS process turns."""
CORRECT_SHARE = 0.4
SEEDS = (0, 1, 2)
POOLED = ("igpo_separate", "igpo_joint")
NUM_ERRORS = 4.0
"""Half the width of every interval in standard errors. One in 16,000 measurements is outside by chance."""
PLUG_IN_BIAS = 3.0 / GROUP_SIZE
"""Allowed bias from division by an estimated standard deviation. It is of order 1 / (members of a turn group)."""


@functools.cache
def gain_scales(seed: int) -> torch.Tensor:
    """Return the scale of the gains of each question, [NUM_PROMPTS] in (0.5, 2)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return 0.5 + 1.5 * torch.rand(NUM_PROMPTS, generator=generator, dtype=torch.float64)


@functools.cache
def simulate(
    seed: int, rho: float = 0.0, *, group_size: int = GROUP_SIZE, gain_per_depth: float = 0.0
) -> TurnTable:
    """Return a batch of NUM_PROMPTS x group_size rollouts. The rollouts of a prompt have consecutive rows.

    Args:
        rho: correlation of x at neighbouring turns of a rollout.
        gain_per_depth: added to every gain of a rollout, times its number of process turns. 0: gains do not depend on
            depth.
    """
    generator = torch.Generator().manual_seed(seed)
    num = NUM_PROMPTS * group_size
    x = torch.randn(num, MAX_TURNS, generator=generator, dtype=torch.float64)
    for column in range(1, MAX_TURNS):
        x[:, column] = rho * x[:, column - 1] + math.sqrt(1 - rho**2) * x[:, column]
    depths = 1 + torch.multinomial(DEPTH_SHARES, num, replacement=True, generator=generator)
    gains = gain_scales(seed).repeat_interleave(group_size)[:, None] * (MEANS + SPREADS * x)
    gains += gain_per_depth * depths[:, None]
    outcomes = (torch.rand(num, generator=generator) < CORRECT_SHARE).double()
    rows = zip(gains.tolist(), depths.tolist(), outcomes.tolist(), strict=True)
    trajectories = [
        Trajectory(
            prompt_index=row // group_size,
            prompt_id="",
            sample_index=row % group_size,
            prompt_tokens=[0],
            turns=[
                *(
                    Turn(
                        tokens=[1],
                        rollout_logprobs=[0.0],
                        calls=[Call(tool="search", arguments="q")],
                        info_gain=gain,
                    )
                    for gain in gains[:depth]
                ),
                Turn(tokens=[2], rollout_logprobs=[0.0]),
            ],
            stop_reason="answer",
            outcome_reward=outcome,
        )
        for row, (gains, depth, outcome) in enumerate(rows)
    ]
    return build_turn_table(trajectories, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS)


def advantages_of(table: TurnTable, name: str, **fields) -> TurnAdvantages:
    return compute_advantages(table, AlgorithmConfig(advantage=name, **fields), dp_group=None)


def turn_part(table: TurnTable, **fields) -> torch.Tensor:
    """Return A2TGPO's advantages of process turns minus the outcome, [N, T]."""
    result = advantages_of(table, "turn_group", **fields)
    return (result.advantages[:, :-1] - result.normalized_outcome[:, None]).where(table.has_gain, 0.0)


def by_prompt(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return the mean of `values` over the rollouts of a prompt that have the turn, [NUM_PROMPTS, T]."""
    total = (values * present).view(NUM_PROMPTS, -1, values.shape[1]).sum(1)
    count = present.view(NUM_PROMPTS, -1, values.shape[1]).sum(1)
    assert count.min() >= 1
    return total / count


def mean_and_error(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean over the first axis, whose samples are independent, and the standard error of the mean."""
    return samples.mean(0), samples.std(0) / math.sqrt(samples.shape[0])


def drift(means: torch.Tensor) -> float:
    """Return the largest mean over turns minus the smallest."""
    return (means.max() - means.min()).item()


def by_terms(values: torch.Tensor, table: TurnTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values [N, T] in the order of their numbers of terms n_i - t + 1 = 1..T, and whether each exists,
    [N, T] bool.
    """
    columns = table.num_process_turns[:, None] - torch.arange(1, MAX_TURNS + 1)
    return values.gather(1, columns.clamp(min=0)), columns >= 0


def slope_over_terms(values: torch.Tensor, table: TurnTable) -> tuple[float, float]:
    """Return the slope b of variance ~ terms^b, and its standard error from leaving out one prompt at a time."""
    aligned, present = by_terms(values, table)
    variance = by_prompt(aligned.square(), present)  # [NUM_PROMPTS, T]
    without = log_slope((variance.sum(0) - variance) / (NUM_PROMPTS - 1))  # [NUM_PROMPTS]
    error = math.sqrt((NUM_PROMPTS - 1) / NUM_PROMPTS * (without - without.mean()).square().sum())
    return log_slope(variance.mean(0)).item(), error


def log_slope(values: torch.Tensor) -> torch.Tensor:
    """Return the least-squares slope of log `values` [..., T] over log(1..T)."""
    log_terms = torch.arange(1, MAX_TURNS + 1, dtype=torch.float64).log()
    centred = log_terms - log_terms.mean()
    return (values.log() * centred).sum(-1) / centred.square().sum()


def autoregressive_variance(rho: float) -> torch.Tensor:
    """Return the variance of (sum of r unit-variance AR(1) terms) / sqrt(r) for r = 1..T, [T]."""
    return torch.tensor(
        [
            1 + 2 * sum((1 - lag / terms) * rho**lag for lag in range(1, terms))
            for terms in range(1, MAX_TURNS + 1)
        ],
        dtype=torch.float64,
    )


# --- Proposition 1: one pool for all turns is biased by position, turn groups are not. ---


def pooled_prediction(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean (mu_t - mu_bar) / sigma_pool and the spread sigma_t / sigma_pool of pooled gains, [NUM_PROMPTS,
    T] each.
    """
    scales = gain_scales(seed)[:, None]
    means, variances = scales * MEANS, (scales * SPREADS).square()  # [NUM_PROMPTS, T]
    shares = DEPTH_SHARES.flip(0).cumsum(0).flip(0)  # a rollout has turn t if it is at least that deep
    pool = [means, variances, shares.expand_as(means)]
    if name == "igpo_joint":
        outcome = (CORRECT_SHARE, CORRECT_SHARE * (1 - CORRECT_SHARE), 1.0)
        pool = [
            torch.cat([p, scales.new_full(scales.shape, o)], 1) for p, o in zip(pool, outcome, strict=True)
        ]
    pool_means, pool_variances, weights = pool
    weights = weights / weights.sum(1, keepdim=True)
    centre = (weights * pool_means).sum(1, keepdim=True)
    spread = (weights * (pool_variances + (pool_means - centre).square())).sum(1, keepdim=True).sqrt()
    return (means - centre) / spread, variances.sqrt() / spread


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", POOLED)
def test_pooling_shifts_each_turn_by_its_mean_over_the_pools_deviation(name, seed):
    table = simulate(seed)
    gains = by_prompt(advantages_of(table, name).normalized_gain, table.has_gain)
    predicted, _ = pooled_prediction(name, seed)
    deviation, error = mean_and_error(gains - predicted)
    assert error.max() < 0.02, "too few rollouts to tell"
    # a pool has several times as many members as a turn group
    assert (deviation.abs() <= NUM_ERRORS * error + PLUG_IN_BIAS / 4).all(), (deviation, error)
    assert drift(gains.mean(0)) >= 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_turn_groups_have_mean_zero_in_every_bucket(seed):
    table = simulate(seed)
    gains = by_prompt(advantages_of(table, "turn_group").normalized_gain, table.has_gain)
    assert gains.abs().max() <= 1e-9
    assert drift(gains.mean(0)) <= 0.02


def test_pooling_also_weighs_turns_by_their_spread_and_turn_groups_do_not():
    table = simulate(0)
    _, predicted = pooled_prediction("igpo_separate", 0)
    for name, expect in (("igpo_separate", predicted), ("turn_group", torch.ones_like(predicted))):
        gains = advantages_of(table, name).normalized_gain
        centred = gains - by_prompt(gains, table.has_gain).repeat_interleave(GROUP_SIZE, 0)
        spread = by_prompt(centred.square(), table.has_gain).sqrt()
        deviation, error = mean_and_error(spread - expect)
        assert (deviation.abs() <= NUM_ERRORS * error + PLUG_IN_BIAS).all(), (name, deviation, error)
    assert predicted.max() > 2 * predicted.min()


# --- Proposition 2: dividing by the square root of the number of terms keeps the variance. ---


@pytest.mark.parametrize("seed", SEEDS)
def test_rescaled_sum_of_independent_gains_has_variance_one_at_every_turn(seed):
    table = simulate(seed)
    values = turn_part(table)
    for squares, present in (
        (values.square(), table.has_gain),
        (by_terms(values, table)[0].square(), by_terms(values, table)[1]),
    ):
        variance, error = mean_and_error(by_prompt(squares, present))
        assert error.max() < 0.04, "too few rollouts to tell"
        assert ((variance - 1).abs() <= NUM_ERRORS * error + PLUG_IN_BIAS).all(), (variance, error)


@pytest.mark.parametrize("rho", [-0.2, 0.2])
def test_rescaled_sum_of_weakly_dependent_gains_has_bounded_variance(rho):
    """The variance is between 1 and (1 + rho) / (1 - rho) for any number of terms. The bound is 1.5 for rho 0.2 and
    2/3 for -0.2.
    """
    table = simulate(0, rho)
    aligned, present = by_terms(turn_part(table), table)
    variance, error = mean_and_error(by_prompt(aligned.square(), present))
    tolerance = NUM_ERRORS * error + PLUG_IN_BIAS
    assert ((variance - autoregressive_variance(rho)).abs() <= tolerance).all(), (variance, error)
    low, high = sorted((1.0, (1 + rho) / (1 - rho)))
    assert ((variance >= low - tolerance) & (variance <= high + tolerance)).all(), (variance, error)


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_variance_grows_with_the_number_of_terms_and_shrinks_when_divided_by_it(rho):
    table = simulate(0, rho)
    gains = advantages_of(table, "turn_group").normalized_gain
    terms = (table.num_process_turns[:, None] - torch.arange(MAX_TURNS)).clamp(min=1)
    plain = accumulate_process_turns(gains, table.num_process_turns, gamma=1.0, rescale=False)
    rescaled = accumulate_process_turns(gains, table.num_process_turns, gamma=1.0, rescale=True)
    # 0 for independent terms; for rho = 0.2 the growth of autoregressive_variance from one term to six
    expect = log_slope(autoregressive_variance(rho)).item()
    assert expect < 0.2
    for values, exponent in ((rescaled, 0), (plain, 1), (plain / terms, -1)):
        slope, error = slope_over_terms(values, table)
        assert error < 0.025, "too few rollouts to tell"
        assert abs(slope - exponent - expect) <= NUM_ERRORS * error + PLUG_IN_BIAS, (exponent, slope, error)


def test_discounting_only_lowers_the_variance():
    table = simulate(0)
    aligned, present = by_terms(turn_part(table, gamma=0.8), table)
    variance, error = mean_and_error(by_prompt(aligned.square(), present))
    expect = torch.tensor([sum(0.64**k for k in range(terms)) / terms for terms in range(1, MAX_TURNS + 1)])
    assert ((variance - expect).abs() <= NUM_ERRORS * error + PLUG_IN_BIAS).all(), (variance, expect)


# --- Corollary 1: the advantage of process turns is centred and bounded in scale at every turn. ---


@pytest.mark.parametrize("seed", SEEDS)
def test_the_turn_part_does_not_drift_but_the_advantage_of_pooled_gains_does(seed):
    table = simulate(seed)
    mean, error = mean_and_error(by_prompt(turn_part(table), table.has_gain))
    assert error.max() < 0.005, "too few rollouts to tell"
    assert drift(mean) <= 0.02
    for name in POOLED:
        pooled = by_prompt(advantages_of(table, name).advantages[:, :-1], table.has_gain)
        assert drift(pooled.mean(0)) >= 0.3, name


@pytest.mark.parametrize("seed", SEEDS)
def test_the_envelope_does_not_grow_with_the_remaining_turns_but_that_of_pools_does(seed):
    """The envelope is the 99th percentile of |advantage|, including the outcome, over turns that sum 1 to T terms."""
    table = simulate(seed)
    growth = {}
    for name in ("turn_group", *POOLED):
        values, present = by_terms(advantages_of(table, name).advantages, table)
        envelope = torch.stack(
            [values[present[:, k], k].abs().quantile(0.99) for k in range(MAX_TURNS)],
        )
        growth[name] = log_slope(envelope).item()
    assert abs(growth["turn_group"]) <= 0.05, growth
    assert min(growth[name] for name in POOLED) >= 0.15, growth


def test_where_depth_tells_of_the_gains_only_the_plain_sum_stays_centred():
    """The square root gives deep rollouts less weight, so the rescaled mean is 0 only if depth and gain are
    unrelated.
    """
    table = simulate(0, gain_per_depth=0.05)
    plain = by_prompt(turn_part(table, rescale=False), table.has_gain)
    assert plain.abs().max() <= 1e-9
    rescaled = drift(by_prompt(turn_part(table), table.has_gain).mean(0))
    pooled = drift(
        by_prompt(advantages_of(table, "igpo_separate").advantages[:, :-1], table.has_gain).mean(0)
    )
    assert 0.02 < rescaled < 0.2 * pooled, (rescaled, pooled)


# --- The paper's Figure 4 in shape: drift 1.54 against 0.00 (signal), 1.03 against 0.00 (advantage). ---


@pytest.mark.parametrize("seed", SEEDS)
def test_drift_in_groups_of_sixteen_is_that_of_figure_4_in_shape(seed):
    table = simulate(seed, group_size=16)
    count = table.has_gain.sum(0)
    signal, advantage = {}, {}
    for name in ("turn_group", "igpo_separate"):
        result = advantages_of(table, name)
        signal[name] = drift(result.normalized_gain.sum(0) / count)
        advantage[name] = drift((result.advantages[:, :-1] * table.has_gain).sum(0) / count)
    assert signal["turn_group"] <= 1e-9
    assert signal["igpo_separate"] >= 1.0
    assert advantage["igpo_separate"] >= 0.7
    assert advantage["turn_group"] <= 0.1 * advantage["igpo_separate"], advantage
