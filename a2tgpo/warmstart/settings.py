"""Derive a warm start's settings from a run's configuration."""

from __future__ import annotations

import dataclasses
import math

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.dimensions import ModelDimensions, read_dimensions
from a2tgpo.plan.parameters import checkpoint_parameters

REFERENCE_LR, REFERENCE_PARAMETERS, MAX_LR = 1e-5, 8e9, 1e-3
ADAPTER_LR_RATIO = 10
"""Learning rate for adapters, divided by the rate for training all weights."""


def learning_rate(config: RunConfig, dimensions: ModelDimensions) -> float:
    """Return `warmstart.lr` if it is set, or else a default that depends on the size of the model.

    The default is a rule of thumb that has not been tuned. For models of 7 to 70 billion parameters, it is within the
    range of published rates for fine-tuning all weights (2e-5 to 2e-6). Adapters get ten times the rate.
    """
    if config.warmstart.lr:
        return config.warmstart.lr
    by_size = REFERENCE_LR * math.sqrt(REFERENCE_PARAMETERS / checkpoint_parameters(dimensions))
    return min(MAX_LR, by_size * (ADAPTER_LR_RATIO if config.model.lora.enabled else 1))


def source_dimensions(config: RunConfig) -> ModelDimensions:
    """Return the dimensions of the model at `warmstart.source`.

    Raises:
        ConfigError: with a one-line message that names `warmstart.source`, if the dimensions cannot be read.
    """
    try:
        return read_dimensions(config.warmstart.source)
    except ConfigError as error:
        raise ConfigError(f"warmstart.source: {error}") from None


def cold_model(config: RunConfig) -> ModelConfig:
    """Return the configuration of the model at `warmstart.source`, without FP8 unless `warmstart.fp8` is set."""
    fp8 = config.model.fp8 if config.warmstart.fp8 else Fp8Config()
    return dataclasses.replace(config.model, path=config.warmstart.source, fp8=fp8)


def update_settings(config: RunConfig, *, lr: float) -> UpdateConfig:
    """Return the run's optimizer settings with the warm start's learning rates and weight decay.

    The optimizer is not offloaded, because no engine needs the memory of the GPU. Routers are trained, without a
    balancing loss.
    """
    settings = config.warmstart
    return dataclasses.replace(
        config.update,
        lr=lr,
        min_lr=lr / 10,
        lr_schedule="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=settings.weight_decay,
        freeze_router=False,
        router_balance_coef=0.0,
        offload=False,
    )


def as_planned(config: RunConfig, *, lr: float) -> RunConfig:
    """Return the configuration for planning a warm start: engine, reward and RL method have default settings."""
    update = dataclasses.replace(
        update_settings(config, lr=lr), prompts_per_minibatch=UpdateConfig().prompts_per_minibatch
    )
    return dataclasses.replace(
        config,
        model=cold_model(config),
        update=update,
        rollout=RolloutConfig(),
        reward=RewardConfig(),
        algorithm=AlgorithmConfig(),
    )
