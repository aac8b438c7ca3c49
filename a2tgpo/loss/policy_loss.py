"""The loss of one micro-batch: a weighted sum of policy terms, KL penalties and entropy terms of sampled tokens."""

from dataclasses import dataclass

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import OBJECTIVE
from a2tgpo.io.errors import require
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.kl import kl_penalty


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of a micro-batch. Only `loss` has a gradient. The other fields, all [n], are for the metrics."""

    loss: torch.Tensor
    token_loss: torch.Tensor
    """The token's policy term, before it is multiplied by the importance weight and the token weight."""
    ratio: torch.Tensor
    is_clipped: torch.Tensor
    """bool: clipping changed the token's policy term."""
    is_dual_clipped: torch.Tensor
    """bool: the dual clip lowered the token's loss."""
    kl: torch.Tensor
    """Estimated KL to the reference. 0 if there is no reference."""


def policy_loss(
    logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig, *, entropy_weight: float = 0.0
) -> PolicyLoss:
    """Return the loss of a micro-batch with the policy terms of `algorithm.objective`.

    The importance weights multiply the policy term, but neither the KL penalty nor the entropy term. The returned
    `loss` is this micro-batch's share of the mini-batch's loss.

    Args:
        logprobs: [n] log-probs of the current policy, with gradient.
        entropy_weight: the factor of the entropy term, see `entropy.EntropyWeight`.

    Raises:
        ConfigError: with a one-line message, if a user's objective fails or returns a wrong shape.
    """
    trained = logprobs
    if inputs.is_cov_clipped is not None:
        trained = logprobs.where(~inputs.is_cov_clipped, logprobs.detach())
    found = OBJECTIVE.load(config.objective)(trained, inputs, config)
    _require_shapes(found, logprobs, config)
    total = found.loss if inputs.importance is None else inputs.importance * found.loss
    kl = torch.zeros_like(found.loss)
    if inputs.ref_logprobs is not None:
        kl = kl_penalty(logprobs, inputs.ref_logprobs, config.kl_estimator)
        total = total + config.kl_coef * kl
    if inputs.entropy is not None:
        total = total - entropy_weight * inputs.entropy
    is_dual_clipped = found.is_dual_clipped
    return PolicyLoss(
        loss=(inputs.weights * total).sum(),
        token_loss=found.loss.detach(),
        ratio=found.ratio.detach(),
        is_clipped=found.is_clipped,
        is_dual_clipped=torch.zeros_like(found.is_clipped) if is_dual_clipped is None else is_dual_clipped,
        kl=kl.detach(),
    )


def _require_shapes(found: object, logprobs: torch.Tensor, config: AlgorithmConfig) -> None:
    """Raise `ConfigError` unless `found` has a value for each token of `logprobs`."""
    fits = isinstance(found, TokenLosses) and all(
        value.shape == logprobs.shape for value in (found.loss, found.ratio, found.is_clipped)
    )
    rule = "a function that returns TokenLosses with one value per token (docs/methods.md)"
    require(fits, OBJECTIVE.key, config.objective, rule)
