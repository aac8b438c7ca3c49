"""Scoring and updating a real policy on one process: the values of metrics, and the effect of the correction."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from played_step import MAX_TURNS, NUM_MINIBATCHES, correct_rollouts, minibatches_of

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.minibatch import Minibatch
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, lay_out_ratios, update_policy


def scored(
    trajectories: list[Trajectory], policy: Policy, **options
) -> tuple[list[Minibatch], dict[str, float]]:
    minibatches, metrics = compute_old_logprobs(
        policy, minibatches_of(trajectories, policy.groups, **options), distribution=MODEL_DISTRIBUTION
    )
    return minibatches, metrics.values()


def by_trajectory(minibatches: list[Minibatch]) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return for each trajectory the turns of its tokens and the log-probs of trainer and engine in float64."""
    found = {}
    for minibatch in minibatches:
        for batch, old in ((m.batch, m.old_logprobs) for m in minibatch):
            for number, index in enumerate(batch.trajectory_indices):
                rows = (batch.sequence_ids[0] == number) & batch.loss_mask[0]
                turns = batch.turn_index[batch.turn_ids[0, rows]]
                found[index] = turns, old[rows].double(), batch.rollout_logprobs[0, rows].double()
    return found


def test_likelihood_is_the_mean_over_sampled_tokens_and_those_of_correct_answers(
    policy, trajectories
) -> None:
    minibatches, metrics = scored(trajectories, policy)
    assert len(minibatches) == NUM_MINIBATCHES and len(minibatches[0]) > 1
    logprobs = {index: old for index, (_, old, _) in by_trajectory(minibatches).items()}
    assert {i: len(p) for i, p in logprobs.items()} == {
        i: t.num_sampled_tokens for i, t in enumerate(trajectories) if t.turns
    }
    correct = [logprobs[i] for i, t in enumerate(trajectories) if t.exact_match]
    assert metrics["likelihood/mean"] == pytest.approx(float(torch.cat(list(logprobs.values())).mean()))
    assert metrics["likelihood/correct"] == pytest.approx(float(torch.cat(correct).mean()))
    assert len(correct) == 3 and metrics["likelihood/correct"] != metrics["likelihood/mean"]


def test_a_step_without_a_correct_answer_has_no_likelihood_of_one(policy, trajectories) -> None:
    for trajectory in trajectories:
        trajectory.exact_match = 0.0
    _, metrics = scored(trajectories, policy)
    assert "likelihood/correct" not in metrics and metrics["likelihood/mean"] < 0


def test_the_gap_is_over_tokens_with_two_finite_log_probs_and_counts_the_others(policy, trajectories) -> None:
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    for turn, bad in zip(turns, (math.nan, math.inf, -math.inf), strict=False):
        turn.rollout_logprobs[0] = bad
    minibatches, metrics = scored(trajectories, policy)
    tokens = by_trajectory(minibatches).values()
    difference = torch.cat([old - rollout for _, old, rollout in tokens])
    finite = difference[difference.isfinite()]
    assert difference.numel() - finite.numel() == 3 == metrics["gap/unusable_tokens"]
    assert metrics["gap/train_engine_abs_mean"] == pytest.approx(float(finite.abs().mean()), rel=1e-5)
    assert metrics["gap/train_engine_abs_max"] == pytest.approx(float(finite.abs().max()), rel=1e-5)
    k3 = (finite.exp() - finite - 1).mean()
    assert metrics["gap/train_engine_k3"] == pytest.approx(float(k3), rel=1e-4)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_step_without_a_finite_engine_log_prob_has_no_gap_and_no_mean_weight(policy, trajectories) -> None:
    """Guards notice such a step, because they read the count if there is no mean."""
    for turn in (turn for trajectory in trajectories for turn in trajectory.turns):
        turn.rollout_logprobs = [math.nan] * len(turn.tokens)
    minibatches, gaps = scored(trajectories, policy)
    assert [name for name in gaps if name.startswith("gap/")] == ["gap/unusable_tokens"]
    assert gaps["gap/unusable_tokens"] == sum(t.num_sampled_tokens for t in trajectories)
    _, found = correct_rollouts(minibatches, CorrectionConfig(kind="truncate"), policy.groups)
    assert found["correction/unusable_tokens"] == gaps["gap/unusable_tokens"]
    assert not {"correction/mean", "correction/max", "correction/min"} & found.keys()


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_correction_metrics_and_weights_are_those_of_the_whole_step(policy, trajectories, level) -> None:
    """They do not depend on the division into mini-batches and micro-batches. One engine log-prob is not finite."""
    final = next(t for t in trajectories if len(t.turns) == 3).turns[-1]
    final.rollout_logprobs[0] = -math.inf
    config = CorrectionConfig(kind="truncate", level=level, upper=1.5)
    of_packings = []
    for max_tokens in (40, 10_000):
        minibatches, _ = scored(trajectories, policy, max_tokens=max_tokens)
        corrected, metrics = correct_rollouts(minibatches, config, policy.groups)
        of_packings.append(metrics)
        ratio = torch.cat([weights_by_hand(*tokens, level) for tokens in by_trajectory(minibatches).values()])
        usable, num_tokens = ratio[ratio.isfinite()], ratio.numel()
        applied = ratio.nan_to_num(0.0).clamp(max=1.5)
        found = torch.cat([inputs.importance for inputs in itertools.chain.from_iterable(corrected)])
        torch.testing.assert_close(found.double(), applied, rtol=1e-5, atol=1e-7)
        assert metrics == pytest.approx(
            {
                "correction/mean": float(usable.mean()),
                "correction/max": float(usable.max()),
                "correction/min": float(usable.min()),
                "correction/truncated_share": float((usable > 1.5).sum()) / num_tokens,
                "correction/masked_share": 0.0,
                "correction/unusable_tokens": num_tokens - usable.numel(),
                "correction/effective_sample_share": float(
                    applied.sum() ** 2 / (num_tokens * applied.square().sum())
                ),
            },
            rel=1e-5,
        )
        assert 0 < metrics["correction/truncated_share"] < 1 <= num_tokens - usable.numel()
    assert of_packings[0] == pytest.approx(of_packings[1], rel=1e-4)


def weights_by_hand(
    turns: torch.Tensor, old: torch.Tensor, rollout: torch.Tensor, level: str
) -> torch.Tensor:
    """Return weights, NaN if the engine's log-prob of the token, or of one that shares its weight, is not finite."""
    log_ratio = (old - rollout).where(rollout.isfinite(), torch.nan)
    if level == "sequence":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    elif level == "turn":
        log_ratio = torch.stack([log_ratio[turns == own].mean() for own in turns])
    return log_ratio.clamp(max=10).exp()


def test_masked_share_counts_both_sides(policy, trajectories) -> None:
    minibatches, _ = scored(trajectories, policy)
    tokens = by_trajectory(minibatches).values()
    ratio = torch.cat([weights_by_hand(*of_one, "token") for of_one in tokens])
    kept = (ratio >= 0.5) & (ratio <= 2.0)
    _, metrics = correct_rollouts(minibatches, CorrectionConfig(kind="mask"), policy.groups)
    assert 0 < kept.sum() < ratio.numel()
    assert metrics["correction/masked_share"] == pytest.approx(float((~kept).double().mean()))
    share = float(ratio[kept].sum() ** 2 / (ratio.numel() * ratio[kept].square().sum()))
    assert metrics["correction/effective_sample_share"] == pytest.approx(share, rel=1e-4)


def test_without_correction_nothing_is_added(policy, trajectories) -> None:
    minibatches, _ = scored(trajectories, policy)
    corrected, metrics = correct_rollouts(minibatches, CorrectionConfig(), policy.groups)
    assert metrics == {}
    assert all(inputs[0].importance is None for inputs in corrected)


def test_a_log_prob_of_the_trainer_that_is_not_finite_skips_the_update_at_any_weight(
    policy, trajectories
) -> None:
    config = AlgorithmConfig(correction=CorrectionConfig(kind="truncate", level="token"))
    minibatches, _ = scored(trajectories, policy)
    first = minibatches[0][0]
    first.old_logprobs[first.batch.loss_mask[0].nonzero()[0]] = math.nan
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    metrics, _ = update_policy(
        policy, optimizer, schedule, minibatches[:1], config, distribution=MODEL_DISTRIBUTION
    )
    assert metrics.values()["correction/unusable_tokens"] == 1
    assert math.isnan(metrics.values()["update/loss"]) and metrics.values()["update/skipped"] == 1


def test_an_update_trains_on_the_corrected_loss(policy, trajectories) -> None:
    """In the first mini-batch every ratio is 1, so the loss is minus the weighted sum of w A."""
    next(t for t in trajectories if t.turns).turns[0].rollout_logprobs[0] = math.nan
    config = AlgorithmConfig(correction=CorrectionConfig(kind="truncate", level="token"))
    minibatches, _ = scored(trajectories, policy)
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    metrics, _ = update_policy(
        policy, optimizer, schedule, minibatches[:1], config, distribution=MODEL_DISTRIBUTION
    )
    (inputs,), _ = correct_rollouts(minibatches[:1], config.correction, policy.groups)
    expected = -sum(float((i.weights * i.importance * i.advantages).sum()) for i in inputs)
    plain = -sum(float((i.weights * i.advantages).sum()) for i in inputs)
    assert metrics.values()["update/loss"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(plain, rel=1e-2)
    assert metrics.values()["update/skipped"] == 0.0
    assert metrics.values()["correction/mean"] > 0 and abs(metrics.values()["kl/old_policy"]) < 1e-5


def test_a_turns_ratio_is_that_of_its_mean_log_ratio_when_it_was_trained_on(policy, trajectories) -> None:
    minibatches, _ = scored(trajectories, policy)
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-2), total_steps=4)
    _, of_first = update_policy(
        policy, optimizer, schedule, minibatches[:1], AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
    )
    moved = [found.logprobs for found in compute_logprobs(policy, [m.batch for m in minibatches[1]])]
    _, of_second = update_policy(
        policy, optimizer, schedule, minibatches[1:], AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
    )
    shape = len(trajectories), MAX_TURNS
    ratios = lay_out_ratios(policy, of_first + of_second, shape=shape)
    expected = torch.full(shape, math.nan)
    for batch in (microbatch.batch for microbatch in minibatches[0]):
        expected[batch.turn_trajectory, batch.turn_index] = 1.0
    for microbatch, new in zip(minibatches[1], moved, strict=True):
        batch, old = microbatch.batch, microbatch.old_logprobs
        for turn, place in enumerate(zip(batch.turn_trajectory, batch.turn_index, strict=True)):
            rows = batch.loss_mask[0] & (batch.turn_ids[0] == turn)
            expected[place] = (new - old)[rows].mean().exp()
    torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert int(ratios.isfinite().sum()) == sum(len(t.turns) for t in trajectories)
    assert float((ratios.nan_to_num(1.0) - 1).abs().max()) > 1e-3, (
        "the second update should see another policy"
    )


# -- a step of one mini-batch --------------------------------------------------------------------------------


def one_update(
    policy: Policy,
    trajectories: list[Trajectory],
    *,
    scoring: bool,
    entropy_weight: float = 0.0,
    **algorithm,
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """Train a fresh policy on a single mini-batch. Return metrics, weights and the number of additional passes."""
    update = UpdateConfig(lr=1e-3)
    model = ModelConfig(path=policy.path, dtype="float32")
    fresh = build_policy(model, ParallelConfig(), policy.groups, update=update)
    optimizer, schedule = build_optimizer(fresh, update, total_steps=4)
    (minibatch,) = minibatches_of(trajectories, policy.groups, num_minibatches=1, **algorithm)
    assert len(minibatch) > 2
    passes: list[int] = []
    fresh.gpt_models[0].decoder.register_forward_hook(lambda *_: passes.append(1))
    step, metrics = [minibatch], MetricSums()
    if scoring:
        step, metrics = compute_old_logprobs(fresh, step, distribution=MODEL_DISTRIBUTION)
    of_update, _ = update_policy(
        fresh,
        optimizer,
        schedule,
        step,
        AlgorithmConfig(**algorithm),
        distribution=MODEL_DISTRIBUTION,
        entropy_weight=entropy_weight,
    )
    metrics.merge(of_update)
    weights = {name: p.detach().clone() for name, p in fresh.gpt_models[0].named_parameters()}
    return metrics.values(), weights, len(passes) - len(minibatch)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_the_training_pass_of_the_first_mini_batch_gives_what_scoring_gives(
    policy, trajectories, level, kind
) -> None:
    """Metrics and weights are the same without any pass except that of the update."""
    next(t for t in trajectories if t.turns).turns[0].rollout_logprobs[0] = math.nan
    config = {"ratio": level, "correction": CorrectionConfig(kind=kind, level=level, upper=1.5)}
    scored, of_scored, passes = one_update(policy, trajectories, scoring=True, **config)
    found, weights, no_passes = one_update(policy, trajectories, scoring=False, **config)
    assert passes > no_passes == 0
    assert {"entropy/mean", "likelihood/correct", "gap/train_engine_k3", "correction/mean"} < found.keys()
    assert found.pop("kl/old_policy") == 0.0 and abs(scored.pop("kl/old_policy")) < 1e-5
    assert found == pytest.approx(scored, rel=1e-5)
    for name, weight in weights.items():
        assert (weight - of_scored[name]).norm() <= 1e-5 * of_scored[name].norm(), name


def test_an_entropy_term_lowers_the_loss_by_the_mean_entropy(policy, trajectories) -> None:
    """With a weight of 0 the gradients equal those without the term to the bit."""
    config = {"aggregation": "token-mean"}
    adapted = config | {"entropy_coef": 0.5, "entropy_target": 1.0}
    plain, of_plain, _ = one_update(policy, trajectories, scoring=False, **config)
    idle, of_idle, _ = one_update(policy, trajectories, scoring=False, **adapted)
    found, weights, _ = one_update(policy, trajectories, scoring=False, entropy_weight=0.25, **adapted)
    assert idle.pop("entropy/weight") == 0.0 and found["entropy/weight"] == 0.25
    assert idle == plain
    assert all(torch.equal(of_idle[name], weight) for name, weight in of_plain.items())
    assert plain["update/loss"] - found["update/loss"] == pytest.approx(
        0.25 * plain["entropy/mean"], rel=1e-4
    )
    assert any(not torch.equal(weights[name], weight) for name, weight in of_plain.items())


def test_turns_of_a_single_mini_batch_have_ratio_1(policy, trajectories) -> None:
    (minibatch,) = minibatches_of(trajectories, policy.groups, num_minibatches=1)
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    _, found = update_policy(
        policy, optimizer, schedule, [minibatch], AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
    )
    ratios = lay_out_ratios(policy, found, shape=(len(trajectories), MAX_TURNS))
    assert ratios[ratios.isfinite()].tolist() == [1.0] * sum(len(t.turns) for t in trajectories)


def test_a_log_prob_of_a_single_mini_batch_that_is_not_finite_skips_the_update(policy, trajectories) -> None:
    (minibatch,) = minibatches_of(trajectories, policy.groups, num_minibatches=1)
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    norm = policy.gpt_models[0].decoder.final_layernorm.weight
    sound = norm.detach().clone()
    with torch.no_grad():
        norm[0] = math.nan
    metrics, _ = update_policy(
        policy, optimizer, schedule, [minibatch], AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
    )
    with torch.no_grad():
        norm.copy_(sound)
    assert metrics.values()["update/skipped"] == 1 and math.isnan(metrics.values()["update/loss"])


def test_mini_batches_behind_an_update_must_have_been_scored(policy, trajectories) -> None:
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    minibatches = minibatches_of(trajectories, policy.groups)
    with pytest.raises(AssertionError, match="without old log-probs"):
        update_policy(
            policy, optimizer, schedule, minibatches, AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
        )
