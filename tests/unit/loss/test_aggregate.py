from __future__ import annotations

from typing import get_args

import pytest
import torch

from a2tgpo.config.algorithm import Aggregation
from a2tgpo.loss.aggregate import token_weights


def weights_of(counts: list[int], aggregation: str) -> torch.Tensor:
    return token_weights(torch.tensor(counts), aggregation=aggregation, norm_length=7, dp_group=None)


def test_weights_by_hand() -> None:
    """Two trajectories with 2 and 6 tokens."""
    expected = {
        "seq-mean-token-mean": [1 / 4, 1 / 12],
        "token-mean": [1 / 8, 1 / 8],
        "seq-mean-token-sum": [1 / 2, 1 / 2],
        "seq-mean-token-sum-norm": [1 / 7, 1 / 7],
    }
    assert expected.keys() == set(get_args(Aggregation))
    for aggregation, weights in expected.items():
        torch.testing.assert_close(weights_of([2, 6], aggregation), torch.tensor(weights).double())


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_a_trajectory_without_sampled_tokens_changes_no_weight(aggregation) -> None:
    torch.testing.assert_close(weights_of([3, 5, 0], aggregation)[:2], weights_of([3, 5], aggregation))
    assert weights_of([0], aggregation).isfinite().all() and weights_of([], aggregation).shape == (0,)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
def test_weights_of_the_mean_aggregations_sum_to_one_over_tokens(aggregation) -> None:
    counts = torch.tensor([2, 7, 1])
    assert (weights_of([2, 7, 1], aggregation) * counts).sum().item() == pytest.approx(1.0)
