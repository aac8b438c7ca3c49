"""Every objective with all options, in plain Python loops over prompts, rollouts, turns and tokens, and strategies
for the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from hypothesis import strategies as st

from a2tgpo.config.algorithm import Aggregation, AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import PolicyLoss, policy_loss
from a2tgpo.loss.rollout_correction import importance_weights

NORM_LENGTH = 10


@dataclass(frozen=True)
class Token:
    """Log-probs before the update, now, of the reference and of the engine."""

    old: float
    new: float
    reference: float
    rollout: float


@dataclass(frozen=True)
class Turn:
    advantage: float
    gain: float
    """Normalised gain; 0 for a neutral turn."""
    tokens: tuple[Token, ...]


Batch = list[list[list[Turn]]]
"""Nested lists: prompts, rollouts, turns. A rollout may have no turns, and a turn no tokens."""

# Values within the clipping ranges, past them and past dual clips, and 0.
log_ratios = st.one_of(st.just(0.0), st.floats(-0.01, 0.01), st.floats(-0.6, 0.6), st.floats(-12, 12))
tokens = st.builds(
    lambda old, new, reference, rollout: Token(old, old + new, old + reference, old + rollout),
    st.floats(-20, -0.001),
    log_ratios,
    log_ratios,
    log_ratios,
)
gains = st.one_of(st.just(0.0), st.floats(-4, 4))
turns = st.builds(Turn, st.floats(-3, 3), gains, st.lists(tokens, max_size=5).map(tuple))
batches = st.lists(st.lists(st.lists(turns, max_size=3), min_size=1, max_size=3), min_size=1, max_size=3)

LEVELS = ("turn", "sequence", "token")
LEVELS_OF = {
    "clipped_ratio": LEVELS,
    "cispo": LEVELS,
    "sapo": LEVELS,
    "gmpo": ("turn", "sequence"),
    "gspo_token": ("turn", "sequence"),
}
"""The ratios that each objective allows."""
corrections = st.builds(
    CorrectionConfig,
    kind=st.sampled_from(["none", "truncate", "mask"]),
    level=st.sampled_from(LEVELS),
    upper=st.sampled_from([1.0, 1.2, 5.0]),
    lower=st.sampled_from([0.0, 0.5, 0.9]),
)


@st.composite
def configs(draw) -> AlgorithmConfig:
    objective = draw(st.sampled_from(["clipped_ratio", *LEVELS_OF]))
    ratio = draw(st.sampled_from(LEVELS_OF[objective]))
    low, high = draw(st.sampled_from([(3e-3, 4e-3), (0.2, 0.28), (3e-4, 4e-4), (1.0, 4.0)]))
    has_dual_clip = ratio == "token" and objective == "clipped_ratio"
    return AlgorithmConfig(
        objective=objective,
        ratio=ratio,
        clip_low=low,
        clip_high=high,
        clip_beta=draw(st.sampled_from([0.0, 0.3, 0.99])),
        dual_clip=draw(st.sampled_from([0.0, 3.0])) if has_dual_clip else 0.0,
        sapo_tau_positive=draw(st.sampled_from([1.0, 0.3])),
        sapo_tau_negative=draw(st.sampled_from([1.05, 4.0])),
        aggregation=draw(st.sampled_from(get_args(Aggregation))),
        kl_coef=draw(st.sampled_from([0.0, 1e-3, 0.5])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        correction=draw(corrections),
    )


def loss_inputs(batch: Batch, config: AlgorithmConfig, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Return the batch as inputs of the loss, made by the functions that training uses."""
    rollouts = [rollout for prompt in batch for rollout in prompt]
    numbered = [(number, turn) for number, rollout in enumerate(rollouts) for turn in rollout]
    rows = [
        (token, turn, turn_id, number)
        for turn_id, (number, turn) in enumerate(numbered)
        for token in turn.tokens
    ]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    sequence_ids = torch.tensor([row[3] for row in rows], dtype=torch.int64)
    counts = torch.bincount(sequence_ids, minlength=len(rollouts))
    weights = token_weights(counts, aggregation=config.aggregation, norm_length=NORM_LENGTH, dp_group=None)
    inputs = dict(
        old_logprobs=column([row[0].old for row in rows]),
        advantages=column([row[1].advantage for row in rows]),
        clip_scale=clip_scale(column([row[1].gain for row in rows]), beta=config.clip_beta),
        weights=weights[sequence_ids].to(dtype),
        turn_ids=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        sequence_ids=sequence_ids,
        num_turns=len(numbered),
        num_sequences=len(rollouts),
        ref_logprobs=column([row[0].reference for row in rows]) if config.kl_coef else None,
    )
    if config.correction.kind != "none":
        rollout_logprobs = column([row[0].rollout for row in rows])
        found = importance_weights(
            inputs["old_logprobs"],
            rollout_logprobs,
            *LossInputs(**inputs).segments(config.correction.level),
            config.correction,
        )
        inputs["importance"] = found.weights
    return LossInputs(**inputs)


def new_logprobs(batch: Batch, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the new log-probs [n] with gradient, in the order of `loss_inputs`."""
    values = [
        token.new for prompt in batch for rollout in prompt for turn in rollout for token in turn.tokens
    ]
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def loss_and_gradient(
    batch: Batch, config: AlgorithmConfig, dtype: torch.dtype = torch.float64
) -> tuple[PolicyLoss, torch.Tensor]:
    """Return loss and gradient as training computes them."""
    logprobs = new_logprobs(batch, dtype)
    result = policy_loss(logprobs, loss_inputs(batch, config, dtype), config)
    result.loss.backward()
    assert logprobs.grad is not None
    return result, logprobs.grad


def naive_loss_and_gradient(batch: Batch, config: AlgorithmConfig) -> tuple[float, torch.Tensor]:
    """Return loss and gradient from the paper's equations, with float64 autograd over single scalars."""
    leaves = new_logprobs(batch)
    of_turn = naive_tokens(batch, leaves.unbind())
    rollouts = [rollout for prompt in of_turn for rollout in prompt]
    num_tokens = [sum(len(values) for _, values in rollout) for rollout in rollouts]
    num_trajectories = sum(count > 0 for count in num_tokens)
    total = 0.0 * leaves.sum()
    for rollout, count in zip(rollouts, num_tokens, strict=True):
        weight = {
            "seq-mean-token-mean": 1 / (num_trajectories * count) if count else 0.0,
            "token-mean": 1 / sum(num_tokens) if count else 0.0,
            "seq-mean-token-sum": 1 / num_trajectories if count else 0.0,
            "seq-mean-token-sum-norm": 1 / NORM_LENGTH,
        }[config.aggregation]
        for turn, values in rollout:
            for token, new in values:
                shared = {
                    "turn": [(turn, *value) for value in values],
                    "sequence": [(other, *value) for other, others in rollout for value in others],
                    "token": [(turn, token, new)],
                }
                penalty = config.kl_coef * naive_kl(new, token.reference, config.kl_estimator)
                term = NAIVE_TERMS[config.objective](turn, new, shared[config.ratio], config)
                total = total + weight * (naive_importance(shared, config) * term + penalty)
    total.backward()
    assert leaves.grad is not None
    return total.item(), leaves.grad


def naive_tokens(batch: Batch, leaves: tuple[torch.Tensor, ...]) -> list:
    """Return the batch with each token replaced by (token, its leaf), and each turn by (turn, list of these
    pairs).
    """
    left = iter(leaves)
    return [
        [[(turn, [(token, next(left)) for token in turn.tokens]) for turn in rollout] for rollout in prompt]
        for prompt in batch
    ]


def naive_ratio(shared: list) -> torch.Tensor:
    log_ratio = sum(new - token.old for _, token, new in shared) / len(shared)
    return torch.exp(log_ratio) if log_ratio <= 10 else torch.tensor(math.exp(10), dtype=torch.float64)


def naive_range(turn: Turn, config: AlgorithmConfig) -> tuple[float, float]:
    """Return 1 - c eps_low and 1 + c eps_high."""
    c = 1 + config.clip_beta * (2 / (1 + math.exp(-turn.gain)) - 1)
    return 1 - c * config.clip_low, 1 + c * config.clip_high


def naive_clipped(turn: Turn, s: torch.Tensor, config: AlgorithmConfig) -> torch.Tensor:
    """Return -min(s A, clip(s, 1 - c eps_low, 1 + c eps_high) A), computed branch by branch."""
    low, high = naive_range(turn, config)
    clipped = low if s < low else high if s > high else s
    smaller = s if s * turn.advantage <= clipped * turn.advantage else clipped
    term = -smaller * turn.advantage + 0.0 * s
    if config.dual_clip and turn.advantage < 0 and term > -turn.advantage * config.dual_clip:
        return torch.tensor(-turn.advantage * config.dual_clip, dtype=torch.float64)
    return term


def naive_clipped_ratio(turn: Turn, new: torch.Tensor, shared: list, config: AlgorithmConfig) -> torch.Tensor:
    return naive_clipped(turn, naive_ratio(shared), config)


def naive_gspo_token(turn: Turn, new: torch.Tensor, shared: list, config: AlgorithmConfig) -> torch.Tensor:
    """Return the clipped term of s_k = sg(s) pi(y_k) / sg(pi(y_k))."""
    return naive_clipped(turn, naive_ratio(shared).detach() * new.exp() / new.detach().exp(), config)


def naive_cispo(turn: Turn, new: torch.Tensor, shared: list, config: AlgorithmConfig) -> torch.Tensor:
    low, high = naive_range(turn, config)
    return -min(max(naive_ratio(shared).item(), low), high) * turn.advantage * new


def naive_sapo(turn: Turn, new: torch.Tensor, shared: list, config: AlgorithmConfig) -> torch.Tensor:
    tau = config.sapo_tau_positive if turn.advantage > 0 else config.sapo_tau_negative
    return -(4 / tau) / (1 + torch.exp(-tau * (naive_ratio(shared) - 1))) * turn.advantage


def naive_gmpo(turn: Turn, new: torch.Tensor, shared: list, config: AlgorithmConfig) -> torch.Tensor:
    """Return -A times the geometric mean of ratios, each clipped on the side of its token's advantage."""
    logs = []
    for other, token, value in shared:
        low, high = naive_range(other, config)
        log_ratio = value - token.old
        if other.advantage > 0:
            logs.append(log_ratio if log_ratio <= math.log(high) else math.log(high) + 0.0 * value)
        else:
            lowest = math.log(low) if low > 0 else -math.inf
            logs.append(log_ratio if log_ratio >= lowest else lowest + 0.0 * value)
    mean = sum(logs) / len(logs)
    return -turn.advantage * (mean.exp() if mean <= 10 else math.exp(10) + 0.0 * new)


NAIVE_TERMS = {
    "clipped_ratio": naive_clipped_ratio,
    "cispo": naive_cispo,
    "sapo": naive_sapo,
    "gmpo": naive_gmpo,
    "gspo_token": naive_gspo_token,
}


def naive_importance(shared: dict[str, list], config: AlgorithmConfig) -> float:
    correction = config.correction
    if correction.kind == "none":
        return 1.0
    members = [token for _, token, _ in shared[correction.level]]
    w = math.exp(min(10.0, sum(token.old - token.rollout for token in members) / len(members)))
    if correction.kind == "truncate":
        return min(w, correction.upper)
    return w if correction.lower <= w <= correction.upper else 0.0


def naive_kl(new: torch.Tensor, reference: float, estimator: str) -> torch.Tensor:
    if estimator == "k1":
        return new - reference
    if estimator == "k2":
        return (new - reference) ** 2 / 2
    d = reference - new
    d = d if -20 <= d <= 20 else torch.tensor(20.0 if d > 20 else -20.0, dtype=torch.float64)
    estimate = torch.exp(d) - d - 1
    return estimate if estimate <= 10 else torch.tensor(10.0, dtype=torch.float64)
