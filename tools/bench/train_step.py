"""Compare one update of SmolLM2-135M with a plain loop that pads rows and uses transformers and torch.optim.

Both programs run in float32 with one thread, on the same trajectories. Both run forward and backward passes of the
turn-level loss in two micro-batches, clip the gradients, and take a step of AdamW. The forward pass of the update
also gives the old policy's log-probs. This project's update packs trajectories, and runs the output layer only where
a token was sampled. The plain loop pads rows on the right, either in their given order or sorted by length, and runs
the output layer at every position. The plain loop computes no entropies and no metrics.

After `make setup-trl`, the bench also measures TRL's GRPOTrainer, with its own training loop and AdamW, in its own
environment. TRL trains on the same tokens with observations masked, and accumulates gradients over the same two
micro-batches. TRL pads prompts on the left and completions on the right, each to the longest row of the batch. It
computes entropies. TRL computes ratios per token or per sequence, not per turn. In the first update on a batch all
ratios are 1, so TRL's loss and gradient must equal this project's. The bench checks this. TRL's fused output layer,
which is made for GPUs, runs at every position, and once more in the backward pass.

Each variant runs in its own process, so its peak memory is that of its own training. Before the measured update, each
process runs an update on a single trajectory. All variants give the same loss and gradient norm. All variants except
TRL also give the same mean log-prob. TRL does not report this value. The bench takes about 4 minutes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import trl_peer
from torch import Tensor
from trajectories import make_trajectories
from transformers import AutoModelForCausalLM

from a2tgpo.batch.balance import microbatches
from a2tgpo.batch.packing import Alignment, pack, packed_length
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import build_policy
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.parallel.initialize import initialize
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.minibatch import Microbatch, Minibatch
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import update_policy

MODEL = "artifacts/models/smollm2-135m"
ROUNDS = 2
LENGTHS = (64, 96, 70, 128, 180, 80, 104, 66)
"""Number of tokens of each trajectory. Real trajectories are 20 times longer, with the same relative spread and a
long tail."""
NUM_MICROBATCHES = 2
CONFIG, UPDATE = AlgorithmConfig(), UpdateConfig()

Update = Callable[[list[Trajectory]], dict[str, float]]
"""Runs one update on the given trajectories. Returns the update's loss, mean log-prob and gradient norm."""


def trajectories_of(lengths: tuple[int, ...]) -> list[Trajectory]:
    return [
        make_trajectories(1, mean_tokens=length, spread=0.0, max_turns=3, vocab_size=49_000, seed=number)[0]
        for number, length in enumerate(lengths)
    ]


def turn_values(trajectory: Trajectory) -> list[tuple[float, float]]:
    """Return a synthetic pair (advantage, clip scale) for each turn."""
    return [
        (math.cos(len(trajectory.tokens) + turn), 1 + 0.3 * math.sin(turn))
        for turn in range(len(trajectory.turns))
    ]


def packed() -> Update:
    """Return this project's update: the trainer's stage `update` for a step of one mini-batch."""
    groups = initialize(ParallelConfig(), seed=0)
    policy = build_policy(ModelConfig(path=MODEL, dtype="float32"), ParallelConfig(), groups, update=UPDATE)
    optimizer, schedule = build_optimizer(policy, UPDATE, total_steps=10)

    def update(trajectories: list[Trajectory]) -> dict[str, float]:
        minibatch = packed_minibatch(trajectories)
        metrics, _ = update_policy(
            policy, optimizer, schedule, [minibatch], CONFIG, distribution=MODEL_DISTRIBUTION
        )
        found = metrics.values()
        return {
            "loss": found["update/loss"],
            "logprob": found["likelihood/mean"],
            "grad_norm": found["update/grad_norm"],
        }

    return update


def packed_minibatch(trajectories: list[Trajectory]) -> Minibatch:
    minibatch = []
    lengths = [packed_length(t) for t in trajectories]
    for members in microbatches(lengths, sum(lengths), min_count=min(NUM_MICROBATCHES, len(lengths))):
        batch = pack(trajectories, members, align=Alignment())
        rows = [trajectories[i] for i in batch.trajectory_indices]
        values = torch.tensor([value for t in rows for value in turn_values(t)])  # [U, 2]
        weights = [1 / (len(trajectories) * t.num_sampled_tokens) for t in rows]
        minibatch.append(
            Microbatch(
                batch=batch,
                turn_advantages=values[:, 0],
                turn_clip_scales=values[:, 1],
                sequence_weights=torch.tensor(weights),
                sequence_is_correct=torch.zeros(len(rows), dtype=torch.bool),
            )
        )
    return minibatch


def padded(*, is_sorted: bool) -> Update:
    """Return the plain loop's update, with an attention mask, SDPA, and log-probs computed with logsumexp.

    Args:
        is_sorted: whether to sort the trajectories by length.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=UPDATE.lr,
        betas=(UPDATE.adam_beta1, UPDATE.adam_beta2),
        eps=UPDATE.adam_eps,
        weight_decay=UPDATE.weight_decay,
    )

    def logprobs_of(rows: list[Trajectory]) -> Tensor:
        """Return the log-probs [rows, longest - 1] of all tokens except each row's first token."""
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t.tokens) for t in rows], batch_first=True)
        lengths = torch.tensor([len(t.tokens) for t in rows])
        mask = torch.arange(tokens.size(1)) < lengths[:, None]
        logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
        return logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)

    def update(trajectories: list[Trajectory]) -> dict[str, float]:
        rows = sorted(trajectories, key=lambda t: len(t.tokens)) if is_sorted else trajectories
        size = -(-len(rows) // NUM_MICROBATCHES)
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        total, sampled = 0.0, []
        for part in parts:
            logprobs = logprobs_of(part)
            old = logprobs.detach()
            loss = turn_level_loss(part, logprobs, old) / len(rows)
            loss.backward()
            total += loss.item()
            sampled += [old[row, span] for row, t in enumerate(part) for span in sampled_spans(t)]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), UPDATE.clip_grad).item()
        optimizer.step()
        optimizer.zero_grad()
        logprob = torch.cat(sampled).double().mean().item()
        return {"loss": total, "logprob": logprob, "grad_norm": norm}

    return update


def sampled_spans(trajectory: Trajectory) -> list[slice]:
    """Return a slice per turn: the positions whose logits predict the turn's tokens."""
    spans, at = [], len(trajectory.prompt_tokens) - 1
    for turn in trajectory.turns:
        spans.append(slice(at, at + len(turn.tokens)))
        at += len(turn.tokens) + len(turn.observation_tokens)
    return spans


def turn_level_loss(rows: list[Trajectory], logprobs: Tensor, old: Tensor) -> Tensor:
    """Compute Eq. 10-12 with plain loops: the sum over rows of the mean loss over the row's sampled tokens."""
    total = logprobs.new_zeros(())
    for row, trajectory in enumerate(rows):
        values = turn_values(trajectory)
        for span, (advantage, scale) in zip(sampled_spans(trajectory), values, strict=True):
            ratio = (logprobs[row, span] - old[row, span]).mean().exp()
            bounded = ratio.clamp(1 - scale * CONFIG.clip_low, 1 + scale * CONFIG.clip_high)
            turn_loss = torch.maximum(-ratio * advantage, -bounded * advantage)
            total = total + turn_loss * (span.stop - span.start) / trajectory.num_sampled_tokens
    return total


def by_trl() -> dict[str, float]:
    """Run TRL's trainer, and return the values of `measured` except the mean log-prob, which TRL does not report."""
    rows = []
    for trajectory in trajectories_of(LENGTHS):
        completion: list[int] = []
        env_mask, advantages = [], []
        for turn, (advantage, _) in zip(trajectory.turns, turn_values(trajectory), strict=True):
            for tokens, is_sampled in ((turn.tokens, 1), (turn.observation_tokens, 0)):
                completion += tokens
                env_mask += [is_sampled] * len(tokens)
                advantages += [is_sampled * advantage] * len(tokens)
        rows.append(
            {
                "prompt": trajectory.prompt_tokens.tolist(),
                "completion": completion,
                "env_mask": env_mask,
                "advantages": advantages,
            }
        )
    return trl_peer.run(
        "trl_train_step.py",
        {
            "model": MODEL,
            "num_microbatches": NUM_MICROBATCHES,
            "update": dataclasses.asdict(UPDATE),
            "rows": rows,
        },
    )


VARIANTS: dict[str, Callable[[], Update]] = {
    "ours": packed,
    "padded, as rollouts come": lambda: padded(is_sorted=False),
    "padded, sorted by length": lambda: padded(is_sorted=True),
}


def measured(build: Callable[[], Update]) -> dict[str, float]:
    """Build an update and run it in a child process. Return its results, CPU seconds and peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "found.json")

        def run() -> None:
            update = build()
            update(trajectories_of(LENGTHS[:1]))
            trajectories = trajectories_of(LENGTHS)
            start = time.process_time()
            found = update(trajectories)
            record.write_text(json.dumps(found | {"seconds": time.process_time() - start}), encoding="utf-8")

        peak = measure.peak_megabytes(run)
        return json.loads(record.read_text(encoding="utf-8")) | {"peak": peak}


def rows() -> list[measure.Row]:
    names = [*VARIANTS, *([trl_peer.NAME] if trl_peer.is_there() else [])]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names[:: -1 if number % 2 else 1]:
            found[name].append(by_trl() if name == trl_peer.NAME else measured(VARIANTS[name]))
            print(f"  {name}: {found[name][-1]}", flush=True)
    ours = found["ours"]
    shape = f"{len(LENGTHS)} trajectories of {min(LENGTHS)} to {max(LENGTHS)} tokens"
    made = []
    for name in names[1:]:
        is_trl = name == trl_peer.NAME
        baseline_is = name if is_trl else f"transformers and torch.optim, {name}"
        for mine, theirs in zip(ours, found[name], strict=True):
            for value in ("loss", "grad_norm") if is_trl else ("loss", "logprob", "grad_norm"):
                assert math.isclose(mine[value], theirs[value], rel_tol=1e-3, abs_tol=1e-5), (
                    value,
                    mine,
                    theirs,
                )
        made.append(
            measure.compared(
                f"one update of SmolLM2-135M, {shape}",
                [sum(LENGTHS) / run["seconds"] for run in ours],
                [sum(LENGTHS) / run["seconds"] for run in found[name]],
                baseline_is=baseline_is,
                unit="tokens/CPU s",
                ratio_is="ours / baseline",
                target=">= 2.2" if is_trl else ">= 1",
                note=f"float32, one thread; {padded_share(name):.0%} of the baseline's positions are tokens, "
                f"{sampled_share():.0%} of the tokens are sampled"
                + ("; its ratios are of tokens, its output layer runs everywhere on a CPU" if is_trl else ""),
            )
        )
        made.append(
            measure.compared(
                f"peak memory of training, {shape}",
                [run["peak"] for run in ours],
                [run["peak"] for run in found[name]],
                baseline_is=baseline_is,
                unit="MB",
                note="weights, gradients and optimizer state included",
            )
        )
    return made


def sampled_share() -> float:
    """Return the share of tokens that were sampled. This project's update runs the output layer only for these
    tokens."""
    return sum(t.num_sampled_tokens for t in trajectories_of(LENGTHS)) / sum(LENGTHS)


def padded_share(name: str) -> float:
    """Return the share of the positions of baseline `name` that hold a token instead of padding."""
    if name == trl_peer.NAME:
        prompts = [len(t.prompt_tokens) for t in trajectories_of(LENGTHS)]
        completions = [len(t.tokens) - len(t.prompt_tokens) for t in trajectories_of(LENGTHS)]
        return sum(LENGTHS) / (len(LENGTHS) * (max(prompts) + max(completions)))
    lengths = sorted(LENGTHS) if "sorted" in name else list(LENGTHS)
    size = -(-len(lengths) // NUM_MICROBATCHES)
    parts = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    return sum(lengths) / sum(max(part) * len(part) for part in parts)
