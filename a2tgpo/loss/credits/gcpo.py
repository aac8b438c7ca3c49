"""GCPO's token credit (arXiv 2605.29198): tokens that depend on the prompt's guidance get more of the advantage.

A token has log-prob l+ after the prompt, and l- after the contrast prompt, both by the current policy.

    eta_k = min(exp(d_k) - d_k - 1, 10),    d_k = l-_k - l+_k, clamped to [-20, 20]
    w_k = N u_k^a / sum_j u_j^a,            u_k = rank(eta_k) / N,    a = ln(1 - top_mass) / ln(1 - top_share) - 1
    A'_k = w_k A_k

eta estimates the KL divergence between the two predictions (k3). Each token is ranked among the N sampled tokens of
its trajectory, over all turns. Observations are not ranked. The mean of w is 1.

The authors' code ranks equal eta by their position, so the weights run from 0.04 to 2.5 if the two prompts are equal.
Here equal eta have the mean of their ranks, so these weights are all 1. A token with a log-prob that is not finite
has weight 1 and is not ranked.
"""

import math

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs, TokenCredit
from a2tgpo.loss.ranks import average_ranks
from a2tgpo.loss.turn_ratio import segment_mean

MAX_DIFFERENCE = 20.0
MAX_DIVERGENCE = 10.0


def token_credit(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenCredit:
    """Return the weighted advantages, with measurements of the divergences and the weights."""
    assert inputs.contrast_logprobs is not None, "the contrast log-probs come first"
    contrast = config.contrast
    eta, is_usable = divergence(logprobs, inputs.contrast_logprobs)
    weigh = turn_weights if contrast.level == "turn" else token_weights
    exponent = math.log(1 - contrast.top_mass) / math.log(1 - contrast.top_share) - 1
    weights = weigh(eta, is_usable, inputs, exponent)
    ranks = average_ranks(weights, inputs.sequence_ids, inputs.num_sequences)
    lengths = torch.bincount(inputs.sequence_ids, minlength=inputs.num_sequences).double()
    is_top = ranks > (1 - contrast.top_share) * lengths[inputs.sequence_ids]
    top_mass = segment_mean(weights * is_top, inputs.sequence_ids, inputs.num_sequences)
    largest = weights.new_zeros(inputs.num_sequences).scatter_reduce(0, inputs.sequence_ids, weights, "amax")
    return TokenCredit(
        advantages=inputs.advantages * weights.to(inputs.advantages.dtype),
        measured={
            "divergence": eta[is_usable],
            "clamped_share": eta[is_usable] >= MAX_DIVERGENCE,
            "unusable_share": ~is_usable,
            "largest_weight": largest[lengths > 0],
            "top_mass": top_mass[lengths > 0],
        },
    )


def divergence(logprobs: torch.Tensor, contrast: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eta of each token, [n] float64, and whether both log-probs are finite, [n] bool. If not, eta is 0."""
    difference = contrast.double() - logprobs.double()
    is_usable = difference.isfinite()
    d = difference.where(is_usable, 0.0).clamp(-MAX_DIFFERENCE, MAX_DIFFERENCE)
    return (d.exp() - d - 1.0).clamp(max=MAX_DIVERGENCE), is_usable


def token_weights(
    eta: torch.Tensor, is_usable: torch.Tensor, inputs: LossInputs, exponent: float
) -> torch.Tensor:
    """Return the weight that each token gets for its rank in its trajectory, [n] float64."""
    weights = torch.ones_like(eta)
    weights[is_usable] = rank_weights(
        eta[is_usable], inputs.sequence_ids[is_usable], inputs.num_sequences, exponent
    )
    return weights


def turn_weights(
    eta: torch.Tensor, is_usable: torch.Tensor, inputs: LossInputs, exponent: float
) -> torch.Tensor:
    """Return the weight of each token's turn, [n] float64. A trajectory's turns are ranked by their mean eta."""
    turns = inputs.turn_ids[is_usable]
    of_turn = segment_mean(eta[is_usable], turns, inputs.num_turns)
    sequences = turns.new_zeros(inputs.num_turns).index_copy(0, inputs.turn_ids, inputs.sequence_ids)
    is_ranked = torch.bincount(turns, minlength=inputs.num_turns) > 0
    weights = torch.ones_like(of_turn)
    weights[is_ranked] = rank_weights(
        of_turn[is_ranked], sequences[is_ranked], inputs.num_sequences, exponent
    )
    return weights[inputs.turn_ids]


def rank_weights(
    eta: torch.Tensor, group_ids: torch.Tensor, num_groups: int, exponent: float
) -> torch.Tensor:
    """Return the weight w for each value of `eta`, [n] float64. The mean of w over a group is 1.

    Ranks are divided by the group's mean rank, so that equal eta give weights of exactly 1.
    """
    counts = torch.bincount(group_ids, minlength=num_groups)[group_ids]
    scaled = (average_ranks(eta, group_ids, num_groups) / (0.5 * (counts + 1))) ** exponent
    return scaled / segment_mean(scaled, group_ids, num_groups)[group_ids]
