"""Checks of router replay for expert_worker.py, against an engine whose routers choose by noisy logits.

The engine is transformers in one process. Noise changes which experts its gates choose, but not their weights. So a
trainer that replays the choices must compute the engine's log-probs, and the gradients of the same network.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from layout_checks import correction_minibatch
from torch import Tensor
from update_bench import Bench, assert_close, hf_gradients, load_reference, reference_loss

from a2tgpo.batch.context_split import context_positions
from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import PackedBatch, packed_length
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import build_policy
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.model.policy import Policy
from a2tgpo.trajectory import LogProbs, Trajectory
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.routing_check import routing_metrics
from a2tgpo.update.train_step import compute_gradients

from tiny_models import checkpoint_tensors  # isort: skip  (found by what update_bench adds to the path)

NOISE = 0.3
"""Standard deviation of the noise on the logits by which the engine chooses."""


class NoisyEngine:
    """An engine that chooses experts by noisy logits.

    `rows` and `clean` have the experts of each trajectory, [positions, layers, chosen]: those that the engine chose,
    and those that the same model chooses without noise.
    """

    def __init__(self, bench: Bench) -> None:
        self.model = load_reference(bench.folder / "model")
        self._chosen: list[Tensor] = []
        gates = [layer.mlp.gate for layer in self.model.model.layers]
        for number, gate in enumerate(gates):
            gate.forward = self._noisy(gate, number)
        loss, _, _, self.logprobs = reference_loss(self.model, bench.trajectories)
        self.loss = loss.item()
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = checkpoint_tensors(gradients)
        self.rows = {
            index: torch.stack(self._chosen[number * len(gates) : (number + 1) * len(gates)], 1)
            for number, index in enumerate(self.logprobs)
        }
        config = self.model.config
        self.shape = ExpertShape(layers=len(gates), chosen=gates[0].top_k, experts=config.num_experts)
        clean = load_reference(bench.folder / "model")
        self.clean = {
            index: _choices(clean, bench.trajectories[index].tokens.tolist(), gates[0].top_k)
            for index in self.logprobs
        }

    def _noisy(self, gate: Any, layer: int) -> Any:
        generator = torch.Generator().manual_seed(layer)

        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(hidden, gate.weight)
            noise = NOISE * torch.randn(logits.shape, generator=generator)
            chosen = (logits.detach() + noise).topk(gate.top_k, -1).indices
            self._chosen.append(chosen)
            return logits, logits.gather(-1, chosen).softmax(-1), chosen

        return forward

    def played(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Return the trajectories with the engine's log-probs. Each turn has the rows that its request adds."""
        found = copy.deepcopy(trajectories)
        for index, trajectory in enumerate(found):
            held, end = 0, len(trajectory.prompt_tokens)
            for turn in trajectory.turns:
                end += len(turn.tokens)
                if turn.tokens:
                    first = end - len(turn.tokens) - 1
                    turn.rollout_logprobs = LogProbs(self.logprobs[index][first : end - 1].tolist())
                    turn.experts = self.shape.encode(self.rows[index][held : end - 1].numpy())
                    held = end - 1
                end += len(turn.observation_tokens)
        return found


def check_router_replay(bench: Bench) -> None:
    """A trainer that replays chooses the engine's experts for every token, also where it computes layers again.

    Its log-probs and gradients are the engine's. Without replay it chooses others, as often as the metrics say.
    """
    engine = NoisyEngine(bench)
    bench = copy.copy(bench)
    bench.trajectories = engine.played(bench.trajectories)
    model = ModelConfig(path=str(bench.folder / "model"), dtype="float32", recompute="full")
    update = UpdateConfig(distributed_optimizer=False)
    policy = build_policy(model, bench.parallel, bench.groups, update=update, router_replay=True)
    batches = bench.batches(expert_shape=engine.shape)
    _check_choices(policy, bench, batches, engine)
    assert_close(hf_gradients(policy), engine.gradients, 1e-5)
    for batch, scored in zip(batches, compute_logprobs(policy, batches), strict=True):
        if scored is not None:
            gap = (scored.logprobs - batch.rollout_logprobs[0])[batch.loss_mask[0]].abs()
            assert gap.max() <= 1e-5, gap.max()
    _check_metrics(policy, bench, batches, engine)

    without = [dataclasses.replace(batch, experts=None) for batch in batches]
    loss = float(compute_gradients(policy, without, bench.loss_function(without))["loss over all replicas"])
    assert math.isclose(loss, bench.reference.loss, rel_tol=1e-5) and abs(loss - engine.loss) > 1e-3


def _check_choices(policy: Policy, bench: Bench, batches: list[PackedBatch], engine: NoisyEngine) -> None:
    """Train once, and compare the choices of every router with the engine's rows."""
    chosen: dict[int, list[Tensor]] = {}
    for layer in (layer for gpt in policy.gpt_models for layer in gpt.decoder.layers):
        calls = chosen.setdefault(layer.layer_number - 1, [])
        layer.mlp.router.register_forward_hook(lambda _, __, output, calls=calls: calls.append(output[1]))
    sums = compute_gradients(policy, batches, bench.loss_function(batches))
    assert math.isclose(float(sums["loss over all replicas"]), engine.loss, rel_tol=1e-5)
    for layer, calls in chosen.items():
        assert len(calls) % 2 == 0 and len(calls) >= 2 * len(batches)
        for number, batch in enumerate(batches):
            expected = torch.full((batch.num_tokens, engine.shape.chosen), -1)
            for place, index in enumerate(batch.trajectory_indices):
                at = batch.sequence_ids[0] == place
                expected[at] = engine.rows[index][: int(at.sum()), layer]
            if bench.groups.cp_size > 1:
                expected = expected[context_positions(batch.cu_seqlens, 2)[bench.groups.cp_rank]]
            if bench.parallel.sequence:
                expected = expected.chunk(2)[bench.groups.tp_rank]
            real = expected[:, 0] >= 0
            # Once in the forward pass, and once when the backward pass computes the layer again.
            matches = sum(_is_choice(found, expected, real) for found in calls)
            assert matches == 2 or not real.any(), (layer, number, matches)
        calls.clear()


def _is_choice(found: Tensor, expected: Tensor, real: Tensor) -> bool:
    return len(found) == len(expected) and bool(found[real].gather(1, expected[real]).all())


def _check_metrics(policy: Policy, bench: Bench, batches: list[PackedBatch], engine: NoisyEngine) -> None:
    metrics = routing_metrics(policy, [correction_minibatch(batches)], distribution=MODEL_DISTRIBUTION)
    values = metrics.reduce(bench.groups.dp_group)
    own = [
        engine.clean[index][:length].sort(-1).values != engine.rows[index][:length].sort(-1).values
        for index in (batches[0].trajectory_indices if batches else ())
        if (length := packed_length(bench.trajectories[index]))
    ]
    differs = torch.cat(own or [torch.zeros(0, engine.shape.layers, 1, dtype=torch.bool)]).any(
        -1
    )  # [n, layers]
    totals = torch.stack([torch.tensor(len(differs)), differs.any(1).sum(), *differs.sum(0)]).double()
    torch.distributed.all_reduce(totals, group=bench.groups.dp_group)
    tokens, any_layer, *by_layer = totals.tolist()
    assert 0 < by_layer[0] < tokens and any_layer < tokens, totals
    assert math.isclose(values["routing/token_differs"], any_layer / tokens)
    for number, different in enumerate(by_layer, start=1):
        assert math.isclose(values[f"routing/layer_{number}_differs"], different / tokens)
    assert math.isclose(values["routing/differs"], sum(by_layer) / tokens / len(by_layer))
    assert values["routing/gap_replayed"] <= 1e-5 < 1e-3 < values["routing/gap_own"], values
    held = sum(packed_length(t) for t in bench.trajectories if t.num_sampled_tokens)
    assert values["routing/replayed_share"] == 1.0
    assert values["routing/bytes"] == held * engine.shape.layers * engine.shape.chosen


def _choices(model: Any, ids: list[int], top_k: int) -> Tensor:
    """Return the experts that a model without noise chooses, [n, layers, chosen]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(top_k, -1).indices for layer in logits], 1)
