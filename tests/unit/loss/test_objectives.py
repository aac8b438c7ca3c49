"""The properties that set the objectives apart. test_policy_loss.py compares their numbers with plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_by_hand import LEVELS_OF, Batch, Token, Turn, batches, loss_and_gradient, loss_inputs

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.load import load_config
from a2tgpo.config.method_part import ADVANTAGE, OBJECTIVE
from a2tgpo.config.user_files import user_files
from a2tgpo.io.errors import ConfigError

ROOT = Path(__file__).parents[3]
WIDE = {"clip_low": 1.0, "clip_high": 50.0, "clip_beta": 0.0}
"""Clip ranges that no ratio of these tests leaves."""


def with_one_advantage(batch: Batch) -> Batch:
    """The batch with the first turn's advantage and gain in all turns of a rollout."""
    return [
        [[Turn(rollout[0].advantage, rollout[0].gain, turn.tokens) for turn in rollout] for rollout in prompt]
        for prompt in batch
    ]


def moved(batch: Batch, change: float) -> Batch:
    """The batch with every log-prob moved by `change` since the old policy."""
    return [
        [
            [replace(t, tokens=tuple(replace(k, new=k.old + change) for k in t.tokens)) for t in rollout]
            for rollout in prompt
        ]
        for prompt in batch
    ]


def of_log_ratios(advantage: float, *turns: list[float]) -> Batch:
    """One rollout with these log-ratios in its turns."""
    tokens = [tuple(Token(-1.0, -1.0 + change, -1.0, -1.0) for change in turn) for turn in turns]
    return [[[Turn(advantage, 0.0, of_turn) for of_turn in tokens]]]


def test_every_objective_is_tested_against_loops() -> None:
    assert set(LEVELS_OF) == set(OBJECTIVE.names())


@settings(max_examples=60)
@given(batches, st.sampled_from([name for name in LEVELS_OF if name != "cispo"]), st.data())
def test_at_the_old_policy_objectives_share_one_gradient_if_advantages_do(batch, objective, data) -> None:
    batch = moved(with_one_advantage(batch), 0.0)
    ratio = data.draw(st.sampled_from(LEVELS_OF[objective]))
    _, plain = loss_and_gradient(batch, AlgorithmConfig(ratio=ratio))
    _, gradient = loss_and_gradient(batch, AlgorithmConfig(ratio=ratio, objective=objective))
    torch.testing.assert_close(gradient, plain, rtol=1e-12, atol=1e-14)


@settings(max_examples=60)
@given(batches, st.floats(-0.3, 0.3))
def test_gspo_token_is_gspo_if_all_tokens_of_a_sequence_have_one_advantage(batch, change) -> None:
    batch = moved(with_one_advantage(batch), change)
    config = AlgorithmConfig(ratio="sequence", clip_low=0.2, clip_high=0.28)
    result, gradient = loss_and_gradient(batch, config)
    token_result, token_gradient = loss_and_gradient(batch, replace(config, objective="gspo_token"))
    assert token_result.loss.item() == pytest.approx(result.loss.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(token_gradient, gradient, rtol=1e-10, atol=1e-13)


def test_gspo_token_pulls_each_turn_by_its_own_advantage_and_gspo_by_their_mean() -> None:
    batch = of_log_ratios(0.0, [0.1, 0.1], [0.1, 0.1])
    batch = [[[replace(turn, advantage=a) for turn, a in zip(batch[0][0], (1.0, -1.0), strict=True)]]]
    config = AlgorithmConfig(ratio="sequence", **WIDE)
    _, of_token = loss_and_gradient(batch, replace(config, objective="gspo_token"))
    _, of_sequence = loss_and_gradient(batch, config)
    pull = math.exp(0.1) / 4  # s / (number of tokens)
    assert of_token.tolist() == pytest.approx([-pull, -pull, pull, pull])
    assert of_sequence.tolist() == pytest.approx([0.0] * 4, abs=1e-15)


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_gmpo_is_the_published_product_of_clipped_token_terms(advantage) -> None:
    """{prod_t |min(r_t A, clip(r_t, e^-0.4, e^0.4) A)|}^(1/L) sgn(A), over both turns of the sequence."""
    log_ratios = [[0.1, 0.9, -0.8], [-0.1, -2.0, 0.5, 0.0]]
    low, high = math.exp(-0.4), math.exp(0.4)
    config = AlgorithmConfig(
        objective="gmpo", ratio="sequence", clip_low=1 - low, clip_high=high - 1, clip_beta=0.0
    )
    result, gradient = loss_and_gradient(of_log_ratios(advantage, *log_ratios), config)
    product, passes = 1.0, []
    for log_ratio in [value for turn in log_ratios for value in turn]:
        r = math.exp(log_ratio)
        plain, clipped = r * advantage, min(max(r, low), high) * advantage
        product *= abs(min(plain, clipped))
        passes.append(plain <= clipped)
    geometric = product ** (1 / 7) * math.copysign(1, advantage)
    assert result.loss.item() == pytest.approx(-geometric, rel=1e-10)
    # d/d log pi_k of -(product)^(1/L) is itself / L for every token that is not clipped.
    assert gradient.tolist() == pytest.approx([-geometric / 7 if p else 0.0 for p in passes], rel=1e-10)
    assert result.is_clipped.tolist() == [not p for p in passes]


def test_cispo_gives_clipped_tokens_a_gradient_of_limited_weight() -> None:
    batch = of_log_ratios(2.0, [math.log(10.0), 0.0, math.log(0.01)])
    config = AlgorithmConfig(objective="cispo", ratio="token", clip_low=1.0, clip_high=4.0, clip_beta=0.0)
    result, gradient = loss_and_gradient(batch, config)
    assert gradient.tolist() == pytest.approx([-5 * 2.0 / 3, -1 * 2.0 / 3, -0.01 * 2.0 / 3])
    assert result.is_clipped.tolist() == [True, False, False]
    _, clipped = loss_and_gradient(batch, replace(config, objective="clipped_ratio"))
    assert clipped.tolist()[0] == 0.0


def test_sapo_weakens_gradients_smoothly_and_more_for_negative_advantages() -> None:
    config = AlgorithmConfig(objective="sapo", ratio="token", sapo_tau_negative=2.0)
    shares = {}
    for advantage in (1.0, -1.0):
        changes = [0.0, 0.2, 0.5, 1.0]
        _, gradient = loss_and_gradient(of_log_ratios(advantage, changes), config)
        shares[advantage] = [-4 * advantage * g / math.exp(c) for g, c in zip(gradient, changes, strict=True)]
    for share in shares.values():
        assert share[0] == pytest.approx(1.0) and share == sorted(share, reverse=True) and share[-1] > 0
    assert all(n < p for n, p in zip(shares[-1.0][1:], shares[1.0][1:], strict=True))


USERS_OBJECTIVE = """
from a2tgpo.loss.inputs import TokenLosses

def reinforce(logprobs, inputs, config):
    ratio = (logprobs.detach() - inputs.old_logprobs).exp()
    return TokenLosses(loss=-inputs.advantages * logprobs, ratio=ratio, is_clipped=ratio < 0)

def short(logprobs, inputs, config):
    return reinforce(logprobs[1:], inputs, config)

def broken(logprobs, inputs, config):
    return logprobs / inputs.no_such_field

def two(logprobs, inputs):
    return None
"""


def test_an_objective_may_be_a_function_in_a_file_of_the_user(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(USERS_OBJECTIVE)
    config = AlgorithmConfig(objective=f"{tmp_path}/mine.py:reinforce")
    batch = of_log_ratios(2.0, [0.1, -0.3])
    _, gradient = loss_and_gradient(batch, config)
    assert gradient.tolist() == (-2.0 * loss_inputs(batch, config).weights).tolist()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short", "mine.py:5 reinforce: RuntimeError"),
        ("broken", "mine.py:12 broken: AttributeError: 'LossInputs' object has no attribute 'no_such_field'"),
        ("two", "allowed: a function with the arguments (logprobs, inputs, config) (docs/methods.md), but"),
        ("gone", "defines no gone; defined: TokenLosses | reinforce | short | broken | two"),
    ],
)
def test_a_fault_of_the_users_objective_is_one_line_that_names_its_place(tmp_path, name, says) -> None:
    (tmp_path / "mine.py").write_text(USERS_OBJECTIVE)
    config = AlgorithmConfig(objective=f"{tmp_path}/mine.py:{name}")
    with pytest.raises(ConfigError) as caught:
        loss_and_gradient(of_log_ratios(1.0, [0.1, 0.2, 0.3]), config)
    assert says in str(caught.value) and str(caught.value).startswith("algorithm.objective")


def test_an_objective_that_returns_another_shape_is_refused(tmp_path) -> None:
    text = USERS_OBJECTIVE.replace("loss=-inputs.advantages * logprobs,", "loss=logprobs.sum(),")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match="returns TokenLosses with one value per token"):
        loss_and_gradient(
            of_log_ratios(1.0, [0.1]), AlgorithmConfig(objective=f"{tmp_path}/mine.py:reinforce")
        )


def test_an_unknown_objective_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        AlgorithmConfig(objective="cipso")
    assert str(caught.value) == (
        "algorithm.objective is 'cipso'; allowed: cispo | clipped_ratio | gmpo | gspo_token | sapo | "
        "path/to/file.py:token_losses (nearest: cispo)"
    )


def test_the_users_files_of_a_method_are_files_of_the_run(tmp_path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(USERS_OBJECTIVE)
    settings = [f"algorithm.objective={mine}:reinforce", f"algorithm.advantage={mine}:advantages"]
    files = user_files(load_config(ROOT / "configs" / "quickstart.yaml", settings))
    assert files == {ADVANTAGE.key: str(mine), OBJECTIVE.key: str(mine)}
