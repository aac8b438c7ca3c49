"""Train every preset for two steps from the same weights. Each of the 2 ranks of test_methods.py runs this program.

torchrun --nproc-per-node 2 methods_worker.py CONFIG RUNS.json MEASURED.json

RUNS.json is {run name: overrides of CONFIG}. If there is a run NAME_resumed, NAME saves a checkpoint after its first
step, and NAME_resumed begins from this checkpoint in a folder of its own. The program writes the folder of each run,
as launch/train.py would, and trained.json next to these folders. trained.json describes the trained weights, and the
memory that each rank held after some steps. MEASURED.json is {run name: these steps}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from held_memory import held

from a2tgpo.assemble import (
    RunParts,
    assemble,
    build_checkpoints,
    build_contrast_prompts,
    build_reference,
    build_reward,
    build_rollout,
)
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.model.build import build_policy
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.protocol.build import build_protocol
from a2tgpo.reward.load import build_rewards
from a2tgpo.reward.pool import RewardPool
from a2tgpo.run.folder import RunFolder
from a2tgpo.trainer import Trainer
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import build_optimizer


def of_method(parts: RunParts, config: RunConfig) -> RunParts:
    """Return `parts` as `assemble` would build them for `config`, but with the given engine and, unless the run has
    adapters, the given policy.

    Policy and engine are in the memory phase `build`.
    """
    minibatches = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
    policy = parts.policy
    if config.model.lora.enabled:
        policy = build_policy(config.model, config.parallel, parts.groups, update=config.update)
    optimizer, schedule = build_optimizer(policy, config.update, total_steps=config.run.steps * minibatches)
    reference = build_reference(config, parts.groups, policy)
    protocol = build_protocol(
        config,
        parts.tokenizer,
        schemas=parts.toolset.schemas,
        date=parts.rollout.protocol.template.date,
    )
    return dataclasses.replace(
        parts,
        config=config,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        entropy_weight=EntropyWeight(config.algorithm),
        extrapolation=Extrapolation(config.update.extrapolation),
        reference=reference,
        phases=MemoryPhases(
            policy,
            optimizer=optimizer,
            reference=reference,
            engine=parts.engine,
            offload=config.update.offload,
        ),
        state=RolloutState(
            sampler=PromptSampler(len(parts.train_prompts), config.rollout.prompts_per_step, config.run.seed)
        ),
        contrast_prompts=build_contrast_prompts(
            parts.train_prompts.questions, protocol.template, config, parts.groups
        ),
        reward=build_reward(config, protocol),
        reward_pool=RewardPool(build_rewards(config), config.reward),
        rollout=build_rollout(
            config,
            parts.engine_group,
            engine=parts.engine,
            toolset=parts.toolset,
            protocol=protocol,
        ),
    )


def weights(parts: RunParts) -> list[torch.Tensor]:
    return [p.detach() for model in parts.policy.gpt_models for p in model.parameters()]


def digest(tensors: list[torch.Tensor]) -> str:
    """Return a hash of all bits of the tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        # Copy each tensor, because a memory phase cannot resize storage that numpy has seen.
        found.update(tensor.clone().view(torch.uint8).numpy())
    return found.hexdigest()


def train(
    parts: RunParts,
    start: list[torch.Tensor],
    *,
    resume: str = "none",
    is_resumed: bool = False,
    measured: Sequence[int] = (),
) -> dict[str, Any]:
    """Run the steps in the run's folder. Return a description of the trained weights, and the memory held,
    [rank][measured step].

    Args:
        resume: the checkpoint from which the run begins, or "none".
        is_resumed: whether another run begins from the first step of this one.
        measured: the steps after which the memory is measured, which takes about as long as a step.
    """
    config = parts.config
    folder = RunFolder(config, parts.groups)
    checkpoint = folder.open(resume)
    guards = Guards(config.guard, clip_low=config.algorithm.clip_low, clip_high=config.algorithm.clip_high)
    checkpoints = build_checkpoints(parts, folder, guards)
    step = checkpoints.restore(checkpoint)
    recorder = folder.recorder(parts.tokenizer, step=step)
    trainer = Trainer(parts, recorder, checkpoints, guards, folder=folder, step=step)
    held_after = []
    while trainer.step < config.run.steps:
        trainer.train_step()
        recorder.finish_rollouts()
        if trainer.step in measured:
            held_after.append(held())
        if is_resumed and trainer.step == 1:
            checkpoints.save(1)
            checkpoints.finish_saving()
    recorder.close()
    parts.phases.enter("build")
    trained = weights(parts)
    assert dist.group.WORLD is not None
    return {
        "largest_change": max((a - b).abs().max().item() for a, b in zip(trained, start, strict=True)),
        "digests": all_gather_object(digest(trained), dist.group.WORLD),
        "held": all_gather_object(held_after, dist.group.WORLD),
    }


def main() -> None:
    path = sys.argv[1]
    runs, measured = (json.loads(Path(name).read_text()) for name in sys.argv[2:])
    base = load_config(path)
    groups = initialize(base.parallel, seed=base.run.seed)
    parts = assemble(base, groups)
    parts.phases.enter("build")
    start = [weight.clone() for weight in weights(parts)]
    results = {}
    for name, overrides in runs.items():
        began = time.process_time()
        for weight, value in zip(weights(parts), start, strict=True):
            weight.copy_(value)
        parts.engine.weight_version = -1  # the engine has the weights of the previous run
        method = of_method(parts, load_config(path, [*overrides, f"run.name={name}"]))
        has_own_policy = method.policy is not parts.policy
        before = Path(base.run.root) / name.removesuffix("_resumed") / "checkpoints/step_1"
        results[name] = train(
            method,
            [w.clone() for w in weights(method)] if has_own_policy else start,
            resume=str(before) if name.endswith("_resumed") else "none",
            is_resumed=f"{name}_resumed" in runs,
            measured=measured.get(name, ()),
        )
        method.rollout.close()
        method.reward_pool.close()
        if groups.rank == 0:
            print(f"{name}: {time.process_time() - began:.1f} s of CPU time", flush=True)
    if groups.rank == 0:
        (Path(base.run.root) / "trained.json").write_text(json.dumps(results))
    parts.close()
    shutdown()


if __name__ == "__main__":
    main()
