"""Give each sampled token its own advantage, if `algorithm.token_credit` names a function that does so."""

from dataclasses import replace

import torch

from a2tgpo.config.algorithm import WITH_CONTRAST, AlgorithmConfig
from a2tgpo.config.method_part import NO_CREDIT, TOKEN_CREDIT
from a2tgpo.io.errors import require
from a2tgpo.io.user_code import is_user_code
from a2tgpo.loss.inputs import LossInputs, TokenCredit


def needs_contrast(config: AlgorithmConfig) -> bool:
    """Return whether the token credit reads log-probs after contrast prompts.

    A user's function reads these log-probs if its attribute `needs_contrast` is True.
    """
    if is_user_code(config.token_credit):
        return bool(getattr(TOKEN_CREDIT.load(config.token_credit), "needs_contrast", False))
    return config.token_credit in WITH_CONTRAST


@torch.no_grad()
def credit_tokens(
    logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig
) -> tuple[LossInputs, dict[str, torch.Tensor]]:
    """Return the inputs with the advantages of the token credit, and its measurements.

    Without a token credit, the inputs are returned unchanged.

    Args:
        logprobs: [n] log-probs of the current policy.

    Returns:
        The inputs, and a mapping from each metric's name to values. The metric is their mean over the step.

    Raises:
        ConfigError: with a one-line message, if a user's token credit fails or returns a wrong shape.
    """
    if config.token_credit == NO_CREDIT:
        return inputs, {}
    found = TOKEN_CREDIT.load(config.token_credit)(logprobs.detach(), inputs, config)
    fits = isinstance(found, TokenCredit) and found.advantages.shape == inputs.advantages.shape
    rule = "a function that returns TokenCredit with one advantage per token (docs/methods.md)"
    require(fits, TOKEN_CREDIT.key, config.token_credit, rule)
    advantages = found.advantages.detach().to(inputs.advantages.dtype)
    return replace(inputs, advantages=advantages), dict(found.measured)
