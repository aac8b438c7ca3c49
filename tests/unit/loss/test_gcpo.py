"""GCPO's token credit against plain loops in float64, and its three properties."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.contrast import ContrastConfig
from a2tgpo.config.method_part import TOKEN_CREDIT
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.credit import credit_tokens, needs_contrast
from a2tgpo.loss.inputs import LossInputs, TokenCredit
from a2tgpo.loss.ranks import average_ranks

EXPONENT = math.log(1 - 0.8) / math.log(1 - 0.4) - 1
GCPO = AlgorithmConfig(token_credit="gcpo", ratio="token")
OF_TURNS = dataclasses.replace(GCPO, contrast=ContrastConfig(level="turn"))

Sequences = list[list[list[float]]]
"""Trajectories -> turns -> differences of log-probs (contrast prompt minus prompt)."""
differences = st.floats(-25, 25) | st.sampled_from([0.0, 1.0, -1.0])
batches = st.lists(
    st.lists(st.lists(differences, min_size=1, max_size=5), max_size=4), min_size=1, max_size=4
)


def inputs_of(batch: Sequences, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, LossInputs]:
    """Log-probs, and inputs in which every advantage is 1: the credit's advantages are then its weights."""
    rows = [(d, i, t) for i, turns in enumerate(batch) for t, turn in enumerate(turns) for d in turn]
    starts = [sum(len(turns) for turns in batch[:i]) for i in range(len(batch))]
    logprobs = torch.full((len(rows),), -2.0, dtype=dtype)
    inputs = LossInputs(
        old_logprobs=logprobs,
        advantages=torch.ones(len(rows), dtype=dtype),
        clip_scale=torch.ones(len(rows), dtype=dtype),
        weights=torch.ones(len(rows), dtype=dtype),
        turn_ids=torch.tensor([starts[i] + t for _, i, t in rows], dtype=torch.int64),
        sequence_ids=torch.tensor([i for _, i, _ in rows], dtype=torch.int64),
        num_turns=sum(map(len, batch)),
        num_sequences=len(batch),
        contrast_logprobs=logprobs + torch.tensor([d for d, _, _ in rows], dtype=dtype),
    )
    return logprobs, inputs


def weights_of(batch: Sequences, config: AlgorithmConfig = GCPO) -> list[float]:
    return credit_tokens(*inputs_of(batch), config)[0].advantages.tolist()


def loop_ranks(values: list[float]) -> list[float]:
    """Mean place among the sorted values, counted from 1."""
    return [(sum(v < x for v in values) + sum(v <= x for v in values) + 1) / 2 for x in values]


def loop_weights(etas: list[float], exponent: float = EXPONENT) -> list[float]:
    n = len(etas)
    powers = [(rank / n) ** exponent for rank in loop_ranks(etas)]
    return [n * power / sum(powers) for power in powers]


def loop_eta(difference: float) -> float:
    contrast = -2.0 + difference  # rounded as the log-probs are
    d = min(max(contrast + 2.0, -20.0), 20.0)
    return min(math.exp(d) - d - 1, 10.0)


@settings(max_examples=200)
@given(batches)
def test_weights_equal_the_published_loop_over_ranked_tokens(batch) -> None:
    expected = []
    for turns in batch:
        expected += loop_weights([loop_eta(d) for turn in turns for d in turn]) if any(turns) else []
    assert weights_of(batch) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=100)
@given(batches)
def test_weights_of_turns_equal_the_loop_over_ranked_means(batch) -> None:
    expected = []
    for turns in batch:
        means = [sum(map(loop_eta, turn)) / len(turn) for turn in turns]
        # Means of equal divergences may differ in their last digit, which may rank them either way.
        if len({round(mean, 9) for mean in means}) < len(means):
            return
        of_turn = loop_weights(means) if means else []
        expected += [w for w, turn in zip(of_turn, turns, strict=True) for _ in turn]
    assert weights_of(batch, OF_TURNS) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3))
def test_equal_prompts_give_every_token_weight_1_exactly(lengths) -> None:
    batch = [[[0.0] * n for n in turns] for turns in lengths]
    for config in (GCPO, OF_TURNS):
        assert set(weights_of(batch, config)) == {1.0}
    _, inputs = inputs_of(batch, torch.float32)
    uneven = dataclasses.replace(inputs, advantages=torch.randn(len(inputs.advantages)))
    credited, _ = credit_tokens(inputs.old_logprobs, uneven, GCPO)
    assert torch.equal(credited.advantages, uneven.advantages)


@settings(max_examples=60)
@given(st.lists(st.floats(0.001, 2.0), min_size=1, max_size=30, unique=True), st.floats(0.1, 1.2))
def test_weights_depend_on_the_divergences_only_through_their_ranks(found, factor) -> None:
    """Multiplying differences above 0 by the same factor keeps the order of their divergences."""
    scaled = [factor * d for d in found]
    if len({loop_eta(d) for d in scaled}) == len({loop_eta(d) for d in found}) == len(found):
        assert weights_of([[scaled]]) == weights_of([[found]])


@settings(max_examples=40)
@given(batches)
def test_weights_of_a_trajectory_do_not_depend_on_the_rest_of_the_micro_batch(batch) -> None:
    for config in (GCPO, OF_TURNS):
        alone = [weights_of([turns], config) for turns in batch]
        assert weights_of(batch, config) == pytest.approx([w for ws in alone for w in ws], rel=1e-14)
        for turns, weights in zip(batch, alone, strict=True):
            if config is GCPO:
                assert sum(weights) == pytest.approx(sum(map(len, turns)), rel=1e-12)


@pytest.mark.parametrize("length", [200, 1000, 5000])
def test_the_top_share_of_tokens_gets_the_top_mass(length) -> None:
    rng = random.Random(length)
    found = [rng.uniform(0.001, 2.0) for _ in range(length)]
    top = sorted(weights_of([[found]]), reverse=True)[: int(0.4 * length)]
    assert sum(top) / len(top) == pytest.approx(2.0, abs=0.02)
    _, measured = credit_tokens(*inputs_of([[found]]), GCPO)
    assert measured["top_mass"].item() == pytest.approx(0.8, abs=0.005)
    assert measured["largest_weight"].item() == pytest.approx(EXPONENT + 1, abs=0.1)
    assert measured["divergence"].mean().item() == pytest.approx(sum(map(loop_eta, found)) / length)


def test_equal_shares_give_weight_1_to_all_tokens() -> None:
    config = dataclasses.replace(GCPO, contrast=ContrastConfig(top_share=0.4, top_mass=0.4))
    assert weights_of([[[0.1, 2.0], [0.5]]], config) == [1.0] * 3


def test_a_token_whose_log_prob_is_not_finite_has_weight_1_and_no_rank() -> None:
    logprobs, inputs = inputs_of([[[0.1, 0.2, 0.3], [0.4]], [[1.0]]])
    contrast = inputs.contrast_logprobs.clone()
    contrast[1], logprobs[4] = math.nan, -math.inf
    broken = dataclasses.replace(inputs, contrast_logprobs=contrast)
    for config, ranked in ((GCPO, loop_weights([0.1, 0.3, 0.4])), (OF_TURNS, loop_weights([0.1, 0.4]))):
        found, measured = credit_tokens(logprobs, broken, config)
        first, second = (ranked[0], ranked[1]) if config is GCPO else (ranked[0], ranked[0])
        middle = 1.0 if config is GCPO else ranked[0]
        assert found.advantages.tolist() == pytest.approx([first, middle, second, ranked[-1], 1.0])
        assert measured["unusable_share"].double().mean().item() == pytest.approx(2 / 5)


def test_a_micro_batch_without_sampled_tokens_is_no_error() -> None:
    for config in (GCPO, OF_TURNS):
        credited, measured = credit_tokens(*inputs_of([[]]), config)
        assert credited.advantages.shape == (0,) and all(v.numel() == 0 for v in measured.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=30))
def test_average_ranks_equal_the_loop(pairs) -> None:
    values = torch.tensor([float(v) for v, _ in pairs])
    groups = torch.tensor([g for _, g in pairs], dtype=torch.int64)
    ranks = average_ranks(values, groups, 5).tolist()
    for group in range(5):
        members = [i for i, (_, g) in enumerate(pairs) if g == group]
        assert [ranks[i] for i in members] == loop_ranks([float(pairs[i][0]) for i in members])


USERS_CREDIT = """
from a2tgpo.loss.inputs import TokenCredit

def confident(logprobs, inputs, config):
    return TokenCredit(advantages=inputs.advantages * logprobs.exp(), measured={"p": logprobs.exp()})

def compared(logprobs, inputs, config):
    return TokenCredit(advantages=inputs.advantages + inputs.contrast_logprobs)

compared.needs_contrast = True

def wrong(logprobs, inputs, config):
    return TokenCredit(advantages=logprobs.sum())
"""


def test_a_token_credit_may_be_a_function_in_a_file_of_the_user(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(USERS_CREDIT)
    config = AlgorithmConfig(token_credit=f"{tmp_path}/mine.py:confident")
    credited, measured = credit_tokens(*inputs_of([[[0.5, 0.1]]]), config)
    assert credited.advantages.tolist() == measured["p"].tolist() == [math.exp(-2.0)] * 2
    assert not needs_contrast(config) and not needs_contrast(AlgorithmConfig()) and needs_contrast(GCPO)
    assert needs_contrast(AlgorithmConfig(token_credit=f"{tmp_path}/mine.py:compared"))
    with pytest.raises(ConfigError, match="returns TokenCredit with one advantage per token"):
        wrong = AlgorithmConfig(token_credit=f"{tmp_path}/mine.py:wrong")
        credit_tokens(*inputs_of([[[0.5, 0.1]]]), wrong)


def test_without_a_token_credit_inputs_pass_unchanged() -> None:
    logprobs, inputs = inputs_of([[[0.5]]])
    assert credit_tokens(logprobs, inputs, AlgorithmConfig()) == (inputs, {})
    assert TOKEN_CREDIT.load("gcpo")(logprobs, inputs, GCPO).__class__ is TokenCredit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_suffix": ""}, "algorithm.contrast.prompt_suffix is ''; allowed: a text"),
        ({"top_share": 1.0}, "algorithm.contrast.top_share is 1.0; allowed: in (0, 1)"),
        (
            {"top_mass": 0.3},
            "algorithm.contrast.top_mass is 0.3; allowed: >= algorithm.contrast.top_share (0.4) and below 1",
        ),
    ],
)
def test_wrong_settings_of_the_contrast_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError) as caught:
        ContrastConfig(**settings)
    assert str(caught.value) == message
