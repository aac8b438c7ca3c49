"""Mini-batches of a played step. Advantages and clip scales depend on the trajectory, not on its row."""

from __future__ import annotations

from dataclasses import replace

import torch

from a2tgpo.advantage.turn_table import TurnAdvantages
from a2tgpo.batch.packing import Alignment
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.importance import correction_metrics, weigh
from a2tgpo.update.minibatch import Minibatch, build_minibatches

NUM_PROMPTS, GROUP_SIZE, MAX_TURNS = 4, 2, 3
NUM_MINIBATCHES = 2


def minibatches_of(
    trajectories: list[Trajectory],
    groups: ParallelGroups,
    *,
    max_tokens: int = 40,
    num_minibatches: int = NUM_MINIBATCHES,
    contrast_prompts: dict[str, list[int]] | None = None,
    token_offsets: list[torch.Tensor] | None = None,
    **algorithm,
) -> list[Minibatch]:
    """Return mini-batches with micro-batches of at most `max_tokens`. `algorithm` has fields of that section."""
    config = RunConfig(
        run=RunSettings(name="r"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", test="unused"),
        search=SearchConfig(corpus="unused"),
        rollout=RolloutConfig(prompts_per_step=NUM_PROMPTS, group_size=GROUP_SIZE),
        update=UpdateConfig(
            prompts_per_minibatch=NUM_PROMPTS // num_minibatches, max_microbatch_tokens=max_tokens
        ),
        algorithm=AlgorithmConfig(**algorithm),
    )
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, NUM_PROMPTS, GROUP_SIZE, MAX_TURNS, generator=generator).double()
    rows = [t.prompt_index for t in trajectories], [t.sample_index for t in trajectories]
    advantages = TurnAdvantages(
        advantages=values[0][rows],
        normalized_gain=torch.zeros(len(trajectories), MAX_TURNS - 1).double(),
        normalized_outcome=torch.zeros(len(trajectories)).double(),
        token_offsets=token_offsets,
    )
    clip_scales = 1 + 0.3 * values[1][rows].tanh()
    return build_minibatches(
        trajectories,
        advantages,
        clip_scales,
        config=config,
        groups=groups,
        align=Alignment(),
        contrast_prompts=contrast_prompts,
    )


def correct_rollouts(
    minibatches: list[Minibatch], config: CorrectionConfig, groups: ParallelGroups
) -> tuple[list[list[LossInputs]], dict[str, float]]:
    """Return the loss's inputs with importance weights for every micro-batch, and the metrics of the weights."""
    weights, corrected = [], []
    for minibatch in minibatches:
        inputs = [microbatch.loss_inputs() for microbatch in minibatch]
        if config.kind != "none":
            own = [weigh(i, m.batch, config) for i, m in zip(inputs, minibatch, strict=True)]
            inputs = [replace(i, importance=w.weights) for i, w in zip(inputs, own, strict=True)]
            weights += own
        corrected.append(inputs)
    return corrected, correction_metrics(weights, config, groups).values()
