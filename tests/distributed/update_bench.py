"""The objects that the checks of update_worker.py use: a tiny model, trajectories, a reference and a layout."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import torch
from tiny_models import checkpoint_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from a2tgpo.batch.balance import deal, microbatches
from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import PackedBatch, alignment, pack, packed_length
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import build_policy, wrap_for_training
from a2tgpo.model.lora import is_adapter
from a2tgpo.model.policy import Policy
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize
from a2tgpo.trajectory import Trajectory, Turn
from a2tgpo.update.train_step import LossFunction, StepResult, train_step

VOCAB = 199
ALGORITHM = AlgorithmConfig(ratio="turn", clip_low=0.003, clip_high=0.004)
LAYOUTS = {
    "dp4": ParallelConfig(timeout_s=60),
    "tp2": ParallelConfig(tensor=2, timeout_s=60),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, timeout_s=60),
    "pp2": ParallelConfig(pipeline=2, timeout_s=60),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2, timeout_s=60),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual=2, timeout_s=60),
    "pp2_uneven": ParallelConfig(pipeline=2, first_stage_layers=1, timeout_s=60),
    "cp2": ParallelConfig(context=2, timeout_s=60),
    "tp2_cp2_sequence": ParallelConfig(tensor=2, context=2, sequence=True, timeout_s=60),
    "cp2_pp2_vpp2": ParallelConfig(context=2, pipeline=2, virtual=2, timeout_s=60),
    # For a mixture of experts:
    "ep2": ParallelConfig(expert=2, timeout_s=60),
    "ep4": ParallelConfig(expert=4, timeout_s=60),
    "tp2_sequence_ep2": ParallelConfig(tensor=2, sequence=True, expert=2, timeout_s=60),
    "tp2_sequence_ep4": ParallelConfig(tensor=2, sequence=True, expert=4, timeout_s=60),
    "pp2_ep2": ParallelConfig(pipeline=2, expert=2, timeout_s=60),
    "cp2_ep2": ParallelConfig(context=2, expert=2, timeout_s=60),
}


def make_trajectories() -> list[Trajectory]:
    """Return nine trajectories of different shapes. One has no sampled token, and one ends with an observation."""
    rng = random.Random(5)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    rollouts = []
    for index in range(9):
        turns = [
            Turn(tokens=tokens(1, 9), rollout_logprobs=[], observation_tokens=tokens(1, 12))
            for _ in range(index % 4)
        ]
        turns.append(Turn(tokens=tokens(0, 0) if index == 4 else tokens(2, 9), rollout_logprobs=[]))
        if index == 6:
            turns.pop()
        if index == 4:
            turns = [Turn(tokens=[], rollout_logprobs=[], observation_tokens=tokens(3, 5))]
        for turn in turns:
            turn.rollout_logprobs = [0.0] * len(turn.tokens)
        rollouts.append(
            Trajectory(
                prompt_index=0,
                prompt_id=str(index),
                sample_index=index,
                prompt_tokens=tokens(2, 15),
                turns=turns,
                stop_reason="answer",
            )
        )
    return rollouts


def coefficient(trajectory: int, turn: int) -> float:
    """Return a value to use as a turn's advantage. It is different for every turn, and may be negative."""
    return math.sin(1.0 + 3.0 * trajectory + 0.7 * turn)


def old_logprobs(logprobs: Tensor) -> Tensor:
    """Return values to use as a trajectory's log-probs before some updates. They are so close that ratios are
    near 1.
    """
    return logprobs.detach() + 0.02 * torch.sin(torch.arange(1.0, len(logprobs) + 1))


@dataclasses.dataclass
class Reference:
    """Losses, gradients and each token's log-prob, computed by transformers on one unpacked trajectory at a time."""

    loss: float
    gradients: dict[str, Tensor]
    turn_loss: float
    """Eq. 10 and 12, written as loops over trajectories and turns. Each sampled token has the same weight."""
    turn_gradients: dict[str, Tensor]
    entropy_loss: float
    """Negative entropy of every sampled token's distribution, weighted as in `Bench.loss_function`."""
    entropy_gradients: dict[str, Tensor]
    logprobs: dict[int, Tensor]
    """For each trajectory, log p of its tokens 1 to m."""


def make_reference(path: Path, trajectories: list[Trajectory]) -> Reference:
    model = load_reference(path)
    loss, turn_loss, entropy_loss, logprobs = reference_loss(model, trajectories)

    def gradients_of(objective: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        objective.backward(retain_graph=True)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return checkpoint_tensors(gradients)

    return Reference(
        loss=loss.item(),
        gradients=gradients_of(loss),
        turn_loss=turn_loss.item(),
        turn_gradients=gradients_of(turn_loss),
        entropy_loss=entropy_loss.item(),
        entropy_gradients=gradients_of(entropy_loss),
        logprobs=logprobs,
    )


def load_reference(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def reference_loss(
    model: Any, trajectories: list[Trajectory]
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """Return the loss of `Bench.loss_function`, the loss of turns, the loss of entropies, and each token's
    log-prob.
    """
    total = sum(t.num_sampled_tokens for t in trajectories)
    loss, turn_loss, entropy_loss, logprobs = torch.zeros(()), torch.zeros(()), torch.zeros(()), {}
    for index, rollout in enumerate(trajectories):
        if not rollout.num_sampled_tokens:
            continue
        ids, weights = list(rollout.prompt_tokens), [0.0] * len(rollout.prompt_tokens)
        for number, turn in enumerate(rollout.turns):
            ids += turn.tokens + turn.observation_tokens
            weights += [coefficient(index, number)] * len(turn.tokens) + [0.0] * len(turn.observation_tokens)
        logits = model(torch.tensor([ids])).logits[0, :-1]
        found = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        entropy_loss = entropy_loss - (entropy * torch.tensor(weights[1:])).sum() / total
        loss = loss - (found * torch.tensor(weights[1:])).sum() / total
        logprobs[index] = found.detach()
        log_ratio, start = found - old_logprobs(found), len(rollout.prompt_tokens) - 1
        for number, turn in enumerate(rollout.turns):
            if turn.tokens:
                ratio = log_ratio[start : start + len(turn.tokens)].mean().exp()
                advantage = coefficient(index, number)
                clipped = ratio.clamp(1 - ALGORITHM.clip_low, 1 + ALGORITHM.clip_high)
                token_loss = torch.maximum(-ratio * advantage, -clipped * advantage)
                turn_loss = turn_loss + len(turn.tokens) * token_loss / total
            start += len(turn.tokens) + len(turn.observation_tokens)
    return loss, turn_loss, entropy_loss, logprobs


class Bench:
    """A layout, and the trajectories of this rank's replica."""

    def __init__(self, folder: Path, name: str, trajectories: list[Trajectory], reference: Reference) -> None:
        self.folder, self.name, self.parallel = folder, name, LAYOUTS[name]
        self.trajectories, self.reference = trajectories, reference
        self.groups: ParallelGroups = initialize(self.parallel, seed=3)
        self.total_tokens = sum(t.num_sampled_tokens for t in trajectories)

    def policy(
        self,
        *,
        distributed_optimizer: bool = False,
        bucket_size: int | None = None,
        dtype: str = "float32",
        lora: LoraConfig | None = None,
        **options: Any,
    ) -> tuple[Policy, UpdateConfig]:
        """Build a policy. With `bucket_size`, gradients are reduced in buckets during the backward pass, and weights
        are gathered in buckets during the next forward pass, as on GPUs.
        """
        update = UpdateConfig(
            distributed_optimizer=distributed_optimizer,
            **{"lr": 1e-2, "weight_decay": 0.1, "lr_schedule": "linear", **options},
        )
        model = ModelConfig(path=str(self.folder / "model"), dtype=dtype, lora=lora or LoraConfig())
        if bucket_size is None:
            return build_policy(model, self.parallel, self.groups, update=update), update
        policy = build_policy(model, self.parallel, self.groups, update=None, trainable=False)
        for chunk in policy.chunks:
            chunk.train()
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(lora is None or is_adapter(name))
        wrap_for_training(policy, update, overlap=True, bucket_size=bucket_size)
        assert len(policy.chunks[0].buffers[0].buckets) > 2
        return policy, update

    def batches(
        self, *, max_tokens: int = 60, replicas: int | None = None, expert_shape: ExpertShape | None = None
    ) -> list[PackedBatch]:
        """Return this replica's micro-batches. The trajectories are divided among the first `replicas` replicas."""
        align = alignment(self.parallel, Fp8Config())
        lengths = [align.segment_length(packed_length(t)) for t in self.trajectories]
        dealt = deal(lengths, replicas or self.groups.dp_size)
        mine = [index for index, replica in enumerate(dealt) if replica == self.groups.dp_rank]
        grouped = microbatches([lengths[index] for index in mine], max_tokens)
        return [
            pack(self.trajectories, [mine[i] for i in group], align=align, expert_shape=expert_shape)
            for group in grouped
        ]

    def loss_function(self, batches: list[PackedBatch]) -> LossFunction:
        def loss(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch = batches[number]
            turns = zip(batch.turn_trajectory.tolist(), batch.turn_index.tolist(), strict=True)
            mask = batch.loss_mask[0]
            weights = torch.zeros(batch.num_tokens)
            weights[mask] = torch.tensor([coefficient(*turn) for turn in turns])[batch.turn_ids[0, mask]]
            metrics = {"tokens": mask.sum(), "entropy": entropy[mask].sum()}
            return -(logprobs * weights).sum() / self.total_tokens, metrics

        return loss

    def step(self, policy: Policy, optimizer: Any, batches: list[PackedBatch] | None = None) -> StepResult:
        batches = self.batches() if batches is None else batches
        return train_step(policy, optimizer, batches, self.loss_function(batches))


def hf_gradients(policy: Policy) -> dict[str, Tensor]:
    """Return the full gradients in the model's buffers under Hugging Face names. They are exported as if they were
    weights.
    """
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.clone()
    gradients = hf_weights(policy)
    for p, weight in zip(parameters, weights, strict=True):
        p.data = weight
    return gradients


def hf_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_hf_weights(policy)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check that each tensor is within `tolerance` of the expected tensor, relative to its norm; 0: equal to
    the bit.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in found.items():
        error = float((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"
        assert tolerance > 0 or torch.equal(tensor, expected[name]), f"{name} is not equal to the bit"


def make_model(path: Path, *, experts: int = 0) -> None:
    torch.manual_seed(11)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2 if experts else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    config = Qwen3Config(**sizes)
    if experts:
        config = Qwen3MoeConfig(**sizes, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=32)
        config.norm_topk_prob = True
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
