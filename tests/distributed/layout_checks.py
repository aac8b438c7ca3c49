"""Checks for every layout, which update_worker.py runs. They compare loss, gradients and scores with transformers.

A check is a function of a `Bench`. It raises AssertionError on the ranks that see a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from update_bench import ALGORITHM, Bench, assert_close, coefficient, hf_gradients, hf_weights, old_logprobs

from a2tgpo.batch.context_split import context_positions
from a2tgpo.batch.packing import Alignment, PackedBatch, pack
from a2tgpo.batch.probes import Probe, ProbedSequence
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.minibatch import Microbatch, Minibatch
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, update_policy
from a2tgpo.update.probe_logprobs import compute_probe_logprobs
from a2tgpo.update.train_step import compute_gradients


def check_gradients(bench: Bench) -> None:
    """Loss and gradients equal those of transformers on single trajectories, however the trajectories are packed and
    divided.
    """
    policy, _ = bench.policy()
    ways = [(1, None), (60, None), (10_000, None), (60, 1)]
    for max_tokens, replicas in ways if bench.name == "dp4" else ways[2:]:
        batches = bench.batches(max_tokens=max_tokens, replicas=replicas)
        counts = all_gather_object(len(batches), bench.groups.dp_group)
        assert replicas is None or bench.groups.dp_size == 1 or 0 in counts, (
            "no replica is without trajectories"
        )
        sums = compute_gradients(policy, batches, bench.loss_function(batches))
        loss = float(sums["loss over all replicas"])
        assert math.isclose(loss, bench.reference.loss, rel_tol=1e-5), (loss, bench.reference.loss)
        tokens = all_gather_object(int(sums.get("tokens", torch.tensor(0))), bench.groups.dp_group)
        assert sum(tokens) == bench.total_tokens, (tokens, bench.total_tokens)
        assert_close(hf_gradients(policy), bench.reference.gradients, 1e-5)


def check_output_rows(bench: Bench) -> None:
    """The output layer runs only at a rank's sampled tokens. The gradients equal those of an output layer at every
    position.
    """
    policy, _ = bench.policy()
    batches, groups, rows = bench.batches(), bench.groups, []
    loss = bench.loss_function(batches)
    last = [model.output_layer for model in policy.gpt_models if model.post_process]
    hooks = [
        layer.register_forward_hook(lambda _layer, _, output: rows.append(len(output[0]))) for layer in last
    ]
    compute_gradients(policy, batches, loss)
    found = hf_gradients(policy)
    for hook in hooks:
        hook.remove()
    sampled = []
    for batch in batches:
        mask = batch.loss_mask[0]
        if groups.cp_size > 1:
            mask = mask[context_positions(batch.cu_seqlens, groups.cp_size)[groups.cp_rank]]
        sampled.append(int(mask.sum()))
    empty = rows[len(batches) :]  # this rank runs as many micro-batches as the replica with the most
    assert rows == ([max(count, 1) for count in sampled] + [1] * len(empty) if last else []), (rows, sampled)
    assert all(layer.sequence_parallel == bench.parallel.sequence for layer in last)
    whole = [dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)) for batch in batches]
    compute_gradients(policy, whole, loss)
    assert_close(found, hf_gradients(policy), 2e-6)


def check_scores(bench: Bench) -> None:
    """The last stage returns the log-probs of transformers. Weights and training mode do not change.

    A log-prob is 0 if the policy did not sample the token.
    """
    policy, _ = bench.policy()
    batches = bench.batches()
    scores = compute_logprobs(policy, batches)
    assert len(scores) == len(batches) and all(chunk.training for chunk in policy.chunks)
    for batch, scored in zip(batches, scores, strict=True):
        assert (scored is not None) == bench.groups.is_pipeline_last
        if scored is None:
            continue
        assert scored.logprobs.shape == scored.entropy.shape == (batch.num_tokens,)
        for number, index in enumerate(batch.trajectory_indices):
            at = batch.sequence_ids[0] == number
            expected = bench.reference.logprobs[index][: int(at.sum())] * batch.loss_mask[0, at]
            torch.testing.assert_close(scored.logprobs[at], expected, rtol=1e-5, atol=1e-5)


def check_probes(bench: Bench) -> None:
    """Tokens in branches have the log-probs that transformers computes for them in the trajectory. Some replicas have
    no branches.
    """
    policy, _ = bench.policy()
    mine = [i for i in bench.reference.logprobs if i % 2 == 0 and i // 2 % 2 == bench.groups.dp_rank]
    sequences, expected = [], []
    for index in mine:
        tokens, logprobs = bench.trajectories[index].tokens, bench.reference.logprobs[index]
        probes = [
            Probe(
                prefix_length=length,
                scaffold=tuple(tokens[length : length + 2]),
                answer=tuple(tokens[length + 2 : length + 7]),
            )
            for length in range(1, len(tokens) - 7, 5)
        ]
        sequences.append(ProbedSequence(tokens=tokens, probes=probes))
        expected.append([logprobs[p.prefix_length + 1 : p.prefix_length + 6].tolist() for p in probes])
    assert any(map(len, expected)) or bench.groups.dp_rank > 1
    found = compute_probe_logprobs(policy, sequences, max_tokens=100)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def updated_batches(bench: Bench) -> tuple[list[PackedBatch], list[LossInputs]]:
    """This replica's micro-batches with the loss's inputs. Some turn is split over the context-parallel ranks."""
    batches, cp_size = bench.batches(max_tokens=10_000), bench.groups.cp_size
    inputs = []
    for batch in batches:
        turns = zip(batch.turn_trajectory.tolist(), batch.turn_index.tolist(), strict=True)
        old = torch.zeros(batch.num_tokens)
        for number, index in enumerate(batch.trajectory_indices):
            expected = bench.reference.logprobs[index]
            at = batch.sequence_ids[0] == number
            old[at] = old_logprobs(expected)[: int(at.sum())]
        microbatch = Microbatch(
            batch=batch,
            turn_advantages=torch.tensor([coefficient(*turn) for turn in turns]),
            turn_clip_scales=torch.ones(batch.num_turns),
            sequence_weights=torch.full((batch.num_sequences,), 1 / bench.total_tokens),
            sequence_is_correct=torch.zeros(batch.num_sequences, dtype=torch.bool),
            old_logprobs=old,
        )
        inputs.append(microbatch.loss_inputs())
        if cp_size > 1:
            held = [
                set(batch.turn_ids[0, own][batch.loss_mask[0, own]].tolist())
                for own in context_positions(batch.cu_seqlens, cp_size)
            ]
            assert set.intersection(*held), "no turn is split over the context-parallel ranks"
    return batches, inputs


def check_sequence_objectives(bench: Bench) -> None:
    """The objectives with one ratio per sequence have the gradients of whole sequences, also if these are split.

    No ratio is clipped. With ratio s, L tokens and advantages A_k, a token's gradient is then that of its log-prob
    times -s A_k (gspo_token), or times -s sum_k A_k / L (gmpo).
    """
    policy, _ = bench.policy()
    batches, inputs = updated_batches(bench)

    def gradients(pull: Callable[[Tensor, LossInputs], Tensor]) -> dict[str, Tensor]:
        def loss_function(number: int, logprobs: Tensor, entropy: Tensor) -> Any:
            return pull(logprobs[batches[number].loss_mask[0]], inputs[number]), {}

        compute_gradients(policy, batches, loss_function)
        return hf_gradients(policy)

    def by_hand(logprobs: Tensor, given: LossInputs, *, has_mean: bool) -> Tensor:
        total = torch.zeros(())
        for number in range(given.num_sequences):
            own = given.sequence_ids == number
            advantages = given.advantages[own]
            s = (logprobs.detach() - given.old_logprobs)[own].mean().exp()
            shared = advantages.mean().expand_as(advantages) if has_mean else advantages
            total = total - (s * shared * logprobs[own]).sum() / bench.total_tokens
        return total

    for objective in ("gmpo", "gspo_token"):
        config = AlgorithmConfig(
            objective=objective, ratio="sequence", clip_low=0.5, clip_high=0.5, clip_beta=0.0
        )
        found = gradients(lambda logprobs, given, config=config: policy_loss(logprobs, given, config).loss)
        has_mean = objective == "gmpo"
        expected = gradients(functools.partial(by_hand, has_mean=has_mean))
        assert_close(found, expected, 2e-6)


def check_turn_ratios(bench: Bench) -> None:
    """With one clipped ratio per turn, loss and gradients equal those of loops over turns, also if turns are split
    over ranks.
    """
    policy, _ = bench.policy()
    batches, inputs = updated_batches(bench)

    def loss_function(number: int, logprobs: Tensor, entropy: Tensor) -> Any:
        result = policy_loss(logprobs[batches[number].loss_mask[0]], inputs[number], ALGORITHM)
        return result.loss, {"clipped": result.is_clipped.sum(), "tokens": torch.tensor(result.ratio.numel())}

    sums = compute_gradients(policy, batches, loss_function)
    loss = float(sums["loss over all replicas"])
    assert math.isclose(loss, bench.reference.turn_loss, rel_tol=1e-5), (loss, bench.reference.turn_loss)
    assert 0 < int(sums["clipped"]) < int(sums["tokens"]), sums
    assert_close(hf_gradients(policy), bench.reference.turn_gradients, 2e-5)


def check_entropy(bench: Bench) -> None:
    """A weighted entropy has the value and the gradients of transformers with a dense softmax."""
    policy, _ = bench.policy()
    batches = bench.batches()

    def loss_function(number: int, logprobs: Tensor, entropy: Tensor) -> Any:
        batch = batches[number]
        turns = zip(batch.turn_trajectory.tolist(), batch.turn_index.tolist(), strict=True)
        mask = batch.loss_mask[0]
        weights = torch.tensor([coefficient(*turn) for turn in turns])[batch.turn_ids[0, mask]]
        return -(entropy[mask] * weights).sum() / bench.total_tokens, {}

    loss = float(compute_gradients(policy, batches, loss_function)["loss over all replicas"])
    assert math.isclose(loss, bench.reference.entropy_loss, rel_tol=1e-5), (
        loss,
        bench.reference.entropy_loss,
    )
    assert_close(hf_gradients(policy), bench.reference.entropy_gradients, 2e-5)


def check_correction(bench: Bench) -> None:
    """The metrics of likelihood and correction cover all tokens of all replicas, also if some replicas have none.

    A training pass gives the same metrics as a scoring pass before it.
    """
    config = AlgorithmConfig(correction=CorrectionConfig(kind="mask", lower=0.01))
    found = []
    for is_scored in (True, False):
        policy, update = bench.policy()
        optimizer, schedule = build_optimizer(policy, update, total_steps=2)
        batches = bench.batches(replicas=2 if bench.groups.dp_size > 2 else 1)
        counts = all_gather_object(len(batches), bench.groups.dp_group)
        assert bench.groups.dp_size == 1 or 0 in counts, "no replica is without trajectories"
        minibatch = correction_minibatch(batches)
        step, metrics = [minibatch], MetricSums()
        if is_scored:
            step, metrics = compute_old_logprobs(policy, step, distribution=MODEL_DISTRIBUTION)
            assert bool(metrics.sums) == bool(batches)
        of_update, ratios = update_policy(
            policy, optimizer, schedule, step, config, distribution=MODEL_DISTRIBUTION
        )
        metrics.merge(of_update)
        assert len(ratios) == (len(batches) if bench.groups.is_pipeline_last else 0)
        found.append(metrics.reduce(bench.groups.dp_group))
    assert found[0].keys() == found[1].keys(), found[0].keys() ^ found[1].keys()
    assert found[1]["ratio/mean"] == 1.0, found[1]

    sampled = {}
    for index, logprobs in bench.reference.logprobs.items():
        alone = pack(bench.trajectories, [index], align=Alignment())
        mask = alone.loss_mask[0]
        sampled[index] = logprobs[: mask.numel()][mask].double(), alone.rollout_logprobs[0, mask].double()
    every = torch.cat([logprobs for logprobs, _ in sampled.values()])
    ratio = torch.cat([logprobs - rollout for logprobs, rollout in sampled.values()]).exp()
    kept = ratio[(ratio >= 0.01) & (ratio <= 2.0)]
    assert 0 < kept.numel() < ratio.numel() == bench.total_tokens
    expected = {
        "likelihood/mean": every.mean(),
        "likelihood/correct": torch.cat([sampled[index][0] for index in sampled if index % 2 == 1]).mean(),
        "correction/mean": ratio.mean(),
        "correction/max": ratio.max(),
        "correction/min": ratio.min(),
        "correction/truncated_share": 0.0,
        "correction/masked_share": 1 - kept.numel() / ratio.numel(),
        "correction/unusable_tokens": 0.0,
        "correction/effective_sample_share": kept.sum() ** 2 / (ratio.numel() * kept.square().sum()),
    }
    for values in found:
        for name, value in expected.items():
            assert math.isclose(values[name], float(value), rel_tol=1e-4, abs_tol=1e-9), (name, values, value)


def correction_minibatch(batches: list[PackedBatch]) -> Minibatch:
    """Return a mini-batch with a loss of zero."""
    return [
        Microbatch(
            batch=batch,
            turn_advantages=torch.zeros(batch.num_turns),
            turn_clip_scales=torch.ones(batch.num_turns),
            sequence_weights=torch.zeros(batch.num_sequences),
            sequence_is_correct=torch.tensor([i % 2 == 1 for i in batch.trajectory_indices]),
        )
        for batch in batches
    ]


def check_update(bench: Bench) -> None:
    """Weights are loaded to the bit. The norm of all ranks' gradients equals that of one process, and the update
    lowers the loss.
    """
    policy, update = bench.policy(distributed_optimizer=True)
    assert_close(hf_weights(policy), load_file(bench.folder / "model" / "model.safetensors"), 0)
    optimizer, _ = build_optimizer(policy, update, total_steps=10)
    result = bench.step(policy, optimizer)
    expected = math.sqrt(sum(float(g.norm()) ** 2 for g in bench.reference.gradients.values()))
    assert math.isclose(result.loss, bench.reference.loss, rel_tol=1e-5), (result.loss, bench.reference.loss)
    assert math.isclose(result.grad_norm, expected, rel_tol=1e-5), (result.grad_norm, expected)
    assert result.update_ok and bench.step(policy, optimizer).loss < result.loss
