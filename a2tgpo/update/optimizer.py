"""Build Megatron's AdamW for the policy's parameters, and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.policy import Policy


def build_optimizer(
    policy: Policy, config: UpdateConfig, *, total_steps: int
) -> tuple[Any, LearningRateSchedule]:
    """Build the optimizer of the policy's trainable parameters, and the schedule of its learning rate.

    Every rank must call this. Biases and weights of norms have no weight decay. The schedule reaches `config.min_lr`
    after `total_steps` optimizer steps, unless it is constant.
    """
    bf16 = policy.dtype == torch.bfloat16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=policy.dtype,
            use_distributed_optimizer=config.distributed_optimizer,
            overlap_param_gather=policy.chunks[0].ddp_config.overlap_param_gather,  # type: ignore[union-attr]
        ),
        policy.chunks,
        use_gloo_process_groups=False,
    )
    return optimizer, LearningRateSchedule(optimizer, config, total_steps=total_steps)


class LearningRateSchedule:
    """A linear warm-up of the learning rate, followed by a constant, linear or cosine schedule.

    Call `step()` once per optimizer step. Update k, counted from 0, uses the rate that Megatron's scheduler has after
    k + 1 steps. Otherwise the first update of a warm-up would have rate 0.
    """

    def __init__(self, optimizer: Any, config: UpdateConfig, *, total_steps: int) -> None:
        self._optimizer = optimizer
        self._config = config
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(total_steps, config.warmup_steps + 1),
            lr_decay_style=config.lr_schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._set_steps_done(0)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self._scheduler.get_lr({})

    @property
    def steps_done(self) -> int:
        """Number of updates so far, including those of earlier starts."""
        return int(self._scheduler.num_steps) - 1

    def step(self) -> None:
        """Move on to the learning rate of the next update."""
        self._scheduler.step(1)

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the step in `state`, with the learning rates of this run's config.

        Call this after loading the optimizer's state, because that state contains the saved run's learning rates.
        """
        self._set_steps_done(state["steps_done"])

    def _set_steps_done(self, steps_done: int) -> None:
        for group in self._optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self._config.lr, self._config.min_lr
        self._scheduler.num_steps = steps_done
        self._scheduler.step(1)
