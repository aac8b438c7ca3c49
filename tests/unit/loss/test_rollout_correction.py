from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_by_hand import batches, loss_inputs

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.rollout_correction import ImportanceWeights, importance_weights

W = [0.25, 0.5, 1.0, 2.0, 4.0]
IDS = torch.tensor([0, 0, 1, 1, 1])


def weigh(ratios: list[float], ids: torch.Tensor | None = None, **options) -> ImportanceWeights:
    """Weigh tokens with these values of pi_trainer / pi_engine."""
    old = torch.tensor([math.log(ratio) - 1.0 for ratio in ratios], dtype=torch.float64)
    rollout = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    return importance_weights(old, rollout, ids, 2, CorrectionConfig(**options))


def test_truncation_keeps_small_weights_and_bounds_large_ones() -> None:
    found = weigh(W, kind="truncate", upper=1.5)
    assert found.weights.tolist() == pytest.approx([0.25, 0.5, 1.0, 1.5, 1.5])
    assert found.is_truncated.tolist() == [False, False, False, True, True]
    assert found.ratio.tolist() == pytest.approx(W) and not (found.is_masked | found.is_unusable).any()


def test_masking_drops_weights_on_both_sides_and_keeps_the_rest_as_they_are() -> None:
    found = weigh(W, kind="mask", lower=0.4, upper=2.5)
    assert found.weights.tolist() == pytest.approx([0.0, 0.5, 1.0, 2.0, 0.0])
    assert found.is_masked.tolist() == [True, False, False, False, True]
    assert found.ratio.tolist() == pytest.approx(W) and not (found.is_truncated | found.is_unusable).any()


def test_tokens_of_a_segment_share_the_geometric_mean() -> None:
    found = weigh(W, IDS, kind="truncate", level="turn", upper=1.9)
    first = math.sqrt(0.25 * 0.5)
    assert found.ratio.tolist() == pytest.approx([first, first, 2.0, 2.0, 2.0])
    assert found.weights.tolist() == pytest.approx([first, first, 1.9, 1.9, 1.9])


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_not_finite_silences_its_segment_alone(kind, bad) -> None:
    rollout = torch.tensor([-1.0, bad, -1.0, -1.0, -1.0])
    for ids, expected in ((None, [1.0, 0.0, 1.0, 1.0, 1.0]), (IDS, [0.0, 0.0, 1.0, 1.0, 1.0])):
        config = CorrectionConfig(kind=kind, level="token" if ids is None else "turn")
        found = importance_weights(torch.full((5,), -1.0), rollout, ids, 2, config)
        assert found.weights.tolist() == expected
        assert found.is_unusable.tolist() == [weight == 0 for weight in expected]
        assert found.ratio.isfinite().all() and not (found.is_masked | found.is_truncated).any()


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_weights_carry_no_gradient_and_keep_the_dtype(kind) -> None:
    old = torch.tensor([-1.0, -1e4, 0.0], requires_grad=True)
    found = importance_weights(old, torch.tensor([-1.0, 0.0, -1e4]), None, 0, CorrectionConfig(kind=kind))
    assert not found.weights.requires_grad and found.weights.dtype == torch.float32
    assert found.weights.tolist() == ([1.0, 0.0, 2.0] if kind == "truncate" else [1.0, 0.0, 0.0])
    assert not found.is_unusable.any()


@settings(max_examples=80)
@given(batches, st.sampled_from(["turn", "sequence", "token"]), st.sampled_from(["truncate", "mask"]))
def test_weights_do_not_depend_on_what_else_is_in_the_microbatch(batch, level, kind) -> None:
    config = AlgorithmConfig(correction=CorrectionConfig(kind=kind, level=level))
    alone = [loss_inputs([[rollout]], config).importance for prompt in batch for rollout in prompt]
    assert torch.equal(loss_inputs(batch, config).importance, torch.cat(alone))
