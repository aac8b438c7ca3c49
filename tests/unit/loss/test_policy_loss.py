import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.config.algorithm import AGGREGATIONS, AlgorithmConfig
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.loss.kl import kl_penalty
from a2tgpo.loss.policy_loss import LossInputs, policy_loss
from a2tgpo.loss.turn_ratio import shared_log_ratio

batches = st.lists(  # trajectories -> turns -> (advantage, clip scale, [(old, new), ...])
    st.lists(
        st.tuples(
            st.floats(-3, 3),
            st.floats(0.7, 1.3),
            st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0)), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)


def flatten(batch):
    flat = {key: [] for key in ("old", "new", "adv", "scale", "turn", "sequence")}
    turn_id = 0
    for sequence, turns in enumerate(batch):
        for advantage, scale, tokens in turns:
            for old, new in tokens:
                for key, value in zip(flat, (old, new, advantage, scale, turn_id, sequence), strict=True):
                    flat[key].append(value)
            turn_id += 1
    return flat, turn_id


def loss_of(batch, config, logprobs=None):
    flat, num_turns = flatten(batch)
    double = lambda key: torch.tensor(flat[key], dtype=torch.float64)  # noqa: E731
    sequence_ids = torch.tensor(flat["sequence"])
    counts = torch.bincount(sequence_ids, minlength=len(batch))
    weights = token_weights(counts, aggregation=config.aggregation, norm_length=10, dp_group=None)
    logprobs = double("new").requires_grad_() if logprobs is None else logprobs
    inputs = LossInputs(
        old_logprobs=double("old"),
        advantages=double("adv"),
        clip_scale=double("scale"),
        weights=weights[sequence_ids],
        turn_ids=torch.tensor(flat["turn"]),
        sequence_ids=sequence_ids,
        num_turns=num_turns,
        num_sequences=len(batch),
    )
    return policy_loss(logprobs, inputs, config), logprobs


def naive_loss(batch, new, config):
    """Eq. 12 token by token, in autograd."""
    total, k = 0.0, 0
    for turns in batch:
        num_tokens = sum(len(tokens) for _, _, tokens in turns)
        sequence_loss = 0.0
        for advantage, scale, tokens in turns:
            log_ratio = sum(new[k + j] - tokens[j][0] for j in range(len(tokens))) / len(tokens)
            k += len(tokens)
            s = torch.exp(torch.clamp(log_ratio, max=10.0))
            low, high = 1 - scale * config.clip_low, 1 + scale * config.clip_high
            clipped = low if s < low else high if s > high else s
            sequence_loss = sequence_loss + len(tokens) * torch.minimum(
                s * advantage, torch.as_tensor(clipped * advantage, dtype=torch.float64)
            )
        total = total + sequence_loss / num_tokens
    return -total / len(batch)


@settings(max_examples=60)
@given(batches, st.sampled_from([(0.003, 0.004), (0.2, 0.28)]))
def test_loss_and_gradient_equal_equation_12_written_naively(batch, clip):
    config = AlgorithmConfig(clip_low=clip[0], clip_high=clip[1])
    result, logprobs = loss_of(batch, config)
    result.loss.backward()
    naive = logprobs.detach().clone().requires_grad_()
    expect = naive_loss(batch, naive, config)
    expect.backward()
    torch.testing.assert_close(result.loss, expect, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, naive.grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(batches)
def test_gradient_at_the_old_policy_is_minus_weight_times_advantage(batch):
    for ratio in ("turn", "sequence", "token"):
        config = AlgorithmConfig(ratio=ratio)
        flat, _ = flatten(batch)
        old = torch.tensor(flat["old"], dtype=torch.float64).requires_grad_()
        result, _ = loss_of(batch, config, logprobs=old)
        assert result.ratio.sub(1).abs().max() == 0 and not result.is_clipped.any()
        result.loss.backward()
        assert old.grad.isfinite().all()


def test_extreme_log_ratios_stay_finite():
    batch = [[(1.0, 1.0, [(-1000.0, 0.0)]), (-1.0, 1.0, [(-1000.0, 0.0)]), (-1.0, 1.0, [(0.0, -1000.0)])]]
    for ratio, dual_clip in (("turn", 0.0), ("token", 3.0)):
        result, logprobs = loss_of(batch, AlgorithmConfig(ratio=ratio, dual_clip=dual_clip))
        result.loss.backward()
        assert result.loss.isfinite() and logprobs.grad.isfinite().all()


def test_a_token_of_a_turn_gets_its_share_of_the_ratio_gradient():
    logprobs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ratio = shared_log_ratio(logprobs, torch.full((4,), -0.1).double(), torch.tensor([0, 0, 0, 1]), 2).exp()
    (gradient,) = torch.autograd.grad(ratio[0], logprobs)
    expect = math.exp(0.1) / 3
    torch.testing.assert_close(gradient, torch.tensor([expect, expect, expect, 0.0]).double())


@given(st.floats(-1e6, 1e6))
def test_clip_scale_stays_within_beta_of_one(gain):
    scale = clip_scale(torch.tensor([gain], dtype=torch.float64), beta=0.3).item()
    assert 0.7 <= scale <= 1.3
    assert clip_scale(torch.zeros(1), beta=0.3).item() == 1.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_trajectory_without_sampled_tokens_changes_no_weight(aggregation):
    def weights(counts):
        return token_weights(torch.tensor(counts), aggregation=aggregation, norm_length=7, dp_group=None)

    torch.testing.assert_close(weights([3, 5, 0])[:2], weights([3, 5]))
    assert weights([0]).isfinite().all() and weights([]).shape == (0,)


def test_weights_of_the_mean_aggregations_sum_to_one_over_tokens():
    counts = torch.tensor([2, 7, 1])
    for aggregation in ("seq-mean-token-mean", "token-mean"):
        weights = token_weights(counts, aggregation=aggregation, norm_length=7, dp_group=None)
        assert (weights * counts).sum().item() == pytest.approx(1.0)


def test_empty_microbatch_has_a_zero_loss_with_a_gradient():
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64)
    detached = empty.detach()
    result = policy_loss(
        empty,
        LossInputs(
            old_logprobs=detached,
            advantages=detached,
            clip_scale=detached,
            weights=detached,
            turn_ids=ids,
            sequence_ids=ids,
            num_turns=0,
            num_sequences=0,
        ),
        AlgorithmConfig(),
    )
    result.loss.backward()
    assert result.loss.item() == 0.0


def test_k3_is_non_negative_and_zero_at_equality():
    logprobs = torch.linspace(-5, 0, 50).double()
    assert (kl_penalty(logprobs, logprobs.flip(0), "k3") >= 0).all()
    assert kl_penalty(logprobs, logprobs, "k3").abs().max() == 0
