"""Checks of a mixture of experts, which each of the 4 ranks of test_experts.py runs. FOLDER/results.json has the
results.

    torchrun --nproc-per-node 4 expert_worker.py FOLDER

This program resembles update_worker.py, and also runs its checks.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_checks import check_resume, check_values_again
from layout_checks import check_gradients, check_scores, check_turn_ratios
from model_worker import check_against_transformers, check_groups
from replay_checks import check_router_replay
from update_bench import (
    Bench,
    assert_close,
    hf_gradients,
    hf_weights,
    load_reference,
    reference_loss,
)
from update_worker import check_nan_is_skipped, run_checks

from a2tgpo.batch.packing import packed_length
from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.model.build import build_policy
from a2tgpo.update.expert_balance import balance_metrics
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import compute_gradients

from tiny_models import checkpoint_tensors  # isort: skip  (found by what update_bench adds to the path)

EXPERTS = 8
NUM_UPDATES = 3
BALANCE = 0.1
"""Weight of the balancing loss. It is so large that the gradients of all weights depend on it."""


def check_transformers(bench: Bench) -> None:
    """Logits and gradients equal those of transformers. Exported and saved weights equal the checkpoint's, to the
    bit.
    """
    check_groups(bench.groups)
    recompute = "full" if bench.parallel.pipeline > 1 else "none"
    model = ModelConfig(path=str(bench.folder / "model"), dtype="float32", recompute=recompute)
    if bench.groups.rank == 0:
        (bench.folder / "model" / "tokenizer.json").write_text("{}")
    dist.barrier()
    found = check_against_transformers(model, bench.parallel, bench.groups, bench.folder)
    assert 0 < found["logits_error"] <= 1e-4 and 0 < found["grad_error"] <= 1e-4, found
    assert found["export_exact"] and found["export_complete"] and found["saved_equal"], found


def check_idle_experts(bench: Bench) -> None:
    """An expert without a token has zero gradients, even if all experts of a rank have no token. Other experts have
    gradients.
    """
    policy, _ = bench.policy()
    tokens = torch.zeros(EXPERTS)

    def count(module: Any, inputs: tuple) -> None:
        per_rank = EXPERTS // bench.groups.ep_size
        first = bench.groups.ep_rank * per_rank
        tokens[first : first + per_rank] += torch.as_tensor(inputs[1]).float()

    (model,) = policy.gpt_models
    layer = model.decoder.layers[0].mlp
    handle = layer.experts.register_forward_pre_hook(count)
    with torch.no_grad():  # a router without a preference sends every token to the same two experts
        layer.router.weight.zero_()
    batches = bench.batches()
    compute_gradients(policy, batches, bench.loss_function(batches))
    handle.remove()
    dist.all_reduce(tokens)
    assert (tokens == 0).sum() == EXPERTS - 2 and tokens.sum() > 0, tokens
    for name, parameter in layer.experts.named_parameters():
        expert = int(name.rpartition("weight")[2]) + bench.groups.ep_rank * layer.num_local_experts
        assert (parameter.main_grad.norm() > 0) == (tokens[expert] > 0), (name, tokens)


def check_expert_load(bench: Bench) -> None:
    """For each layer and expert, a training pass counts as many tokens as transformers sends there, without padding.

    A layer that is recomputed is counted once, and a scoring pass is not counted.
    """
    model = ModelConfig(
        path=str(bench.folder / "model"),
        dtype="float32",
        recompute="full" if bench.parallel.pipeline > 1 else "none",
    )
    policy = build_policy(
        model, bench.parallel, bench.groups, update=UpdateConfig(distributed_optimizer=False)
    )
    batches = bench.batches()
    compute_logprobs(policy, batches)
    compute_gradients(policy, batches, bench.loss_function(batches))
    assert policy.expert_load is not None
    found = policy.expert_load.take()
    reference, expected = load_reference(bench.folder / "model"), torch.zeros_like(found)
    for trajectory in bench.trajectories:
        if length := packed_length(trajectory):
            ids = torch.tensor([list(trajectory.tokens[:length])])
            for layer, logits in enumerate(reference(ids, output_router_logits=True).router_logits):
                expected[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=EXPERTS)
    assert torch.equal(found, expected), (found, expected)
    assert not policy.expert_load.take().any()
    policy.expert_load._counts += 1.0
    metrics = balance_metrics(policy).values()
    assert metrics["experts/load_max"] == metrics["experts/layer_2_load"] == 1.0
    assert metrics["experts/idle_share"] == 0.0


def check_frozen_router(bench: Bench) -> None:
    """Frozen routers keep every bit, also after a restart. The gradients of the other weights do not change."""
    check_resume(bench, freeze_router=True)
    policy, update = bench.policy(distributed_optimizer=True, freeze_router=True)
    optimizer, _ = build_optimizer(policy, update, total_steps=6)
    before = hf_weights(policy)
    norm = bench.step(policy, optimizer).grad_norm
    after = hf_weights(policy)
    routers = {name for name in before if name.endswith(".mlp.gate.weight")}
    others = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(routers) == 2 and others == before.keys() - routers, before.keys() - routers - others
    expected = math.hypot(
        *(float(g.norm()) for name, g in bench.reference.gradients.items() if name in others)
    )
    assert math.isclose(norm, expected, rel_tol=1e-5), (norm, expected)


def check_balance(bench: Bench) -> None:
    """The balancing loss and its gradients equal those of transformers on single trajectories, in each layout."""
    model = ModelConfig(
        path=str(bench.folder / "model"),
        dtype="float32",
        recompute="full" if bench.parallel.pipeline > 1 else "none",
    )
    update = UpdateConfig(distributed_optimizer=False, router_balance_coef=BALANCE)
    policy = build_policy(model, bench.parallel, bench.groups, update=update)
    batches = bench.batches()
    compute_gradients(policy, batches, bench.loss_function(batches))
    found = balance_metrics(policy).reduce(bench.groups.dp_group)["experts/balance_loss"]
    loss, gradients = balanced_reference(bench)
    assert math.isclose(found, loss, rel_tol=1e-5) and loss > 1.001, (found, loss)
    assert_close(hf_gradients(policy), gradients, 1e-4)


def balanced_reference(bench: Bench) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the balancing loss, and the gradients of the policy's loss with the balancing loss."""
    reference = load_reference(bench.folder / "model")
    of_trajectories = []
    for trajectory in bench.trajectories:
        if length := packed_length(trajectory):
            ids = torch.tensor([list(trajectory.tokens[:length])])
            for logits in reference(ids, output_router_logits=True).router_logits:
                chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
                of_trajectories.append(EXPERTS * (chosen.mean(0) / 2 * logits.softmax(-1).mean(0)).sum())
    layers = reference.config.num_hidden_layers
    balance = layers * torch.stack(of_trajectories).mean()
    (reference_loss(reference, bench.trajectories)[0] + BALANCE * balance).backward()
    gradients = checkpoint_tensors({n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
    router = "model.layers.0.mlp.gate.weight"
    assert (gradients[router] - bench.reference.gradients[router]).norm() > 1e-2 * gradients[router].norm()
    return balance.item() / layers, gradients


def check_updates(bench: Bench) -> None:
    """After three updates, weights and gradient norms equal those of one process with transformers and AdamW.

    Between the updates the whole state leaves the GPU and comes back.
    """
    policy, update = bench.policy(distributed_optimizer=True, clip_grad=0.05)
    optimizer, schedule = build_optimizer(policy, update, total_steps=10)
    phases, norms = MemoryPhases(policy, optimizer=optimizer), []
    for _ in range(NUM_UPDATES):
        for phase in ("rollout", "update"):
            phases.enter(phase)
        norms.append(bench.step(policy, optimizer).grad_norm)
    model = load_reference(bench.folder / "model")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(update.adam_beta1, update.adam_beta2),
        eps=update.adam_eps,
        weight_decay=update.weight_decay,
    )
    for norm in norms:
        adam.zero_grad()
        reference_loss(model, bench.trajectories)[0].backward()
        expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), update.clip_grad))
        assert math.isclose(norm, expected, rel_tol=1e-3) and norm > update.clip_grad, (norms, expected)
        adam.step()
    # Adam magnifies rounding errors, so updated weights are close, but not equal.
    weights = checkpoint_tensors({name: p.detach() for name, p in model.named_parameters()})
    assert_close(hf_weights(policy), weights, 2e-3)


def check_from_two_expert_ranks(bench: Bench) -> None:
    """Training continues in another layout from a checkpoint of two expert-parallel ranks. If this layout saves it
    again, it has the same values.
    """
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    root = bench.folder / "checkpoints" / "ep2"
    checkpoint.load(root / "step_2", policy=policy, optimizer=optimizer, schedule=schedule)
    for _ in range(2):
        bench.step(policy, optimizer)
        schedule.step()
    assert_close(hf_weights(policy), torch.load(root / "after_two_more.pt"), 1e-3)
    check_values_again(bench, root / "step_2", dtype="float32")


CHECKS = {
    "ep2": [
        check_transformers,
        check_gradients,
        check_scores,
        check_updates,
        check_nan_is_skipped,
        check_resume,
        check_router_replay,
        check_balance,
    ],
    "dp4": [check_transformers, check_gradients, check_updates, check_from_two_expert_ranks],
    "ep4": [check_transformers, check_gradients, check_updates, check_idle_experts],
    "tp2_sequence": [check_transformers, check_gradients, check_updates, check_from_two_expert_ranks],
    "tp2_sequence_ep2": [
        check_transformers,
        check_gradients,
        check_updates,
        check_expert_load,
        check_frozen_router,
        check_router_replay,
        check_balance,
    ],
    "tp2_sequence_ep4": [check_gradients, check_scores, check_updates, check_from_two_expert_ranks],
    "cp2_ep2": [
        check_gradients,
        check_turn_ratios,
        check_updates,
        check_expert_load,
        check_router_replay,
        check_balance,
    ],
    "pp2_ep2": [
        check_transformers,
        check_gradients,
        check_updates,
        check_from_two_expert_ranks,
        check_expert_load,
        check_router_replay,
        check_balance,
    ],
}


if __name__ == "__main__":
    run_checks(Path(sys.argv[1]), CHECKS, experts=EXPERTS)
