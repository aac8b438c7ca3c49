"""AdamW for machines without a GPU, with the same state as Transformer Engine's FusedAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class CpuFusedAdam(torch.optim.Optimizer):
    """Replacement for FusedAdam that gives Megatron's optimizers and checkpoints the same form on CPU and GPU.

    Like FusedAdam and unlike torch's Adam, this class counts steps per parameter group (`group["step"]`). For each
    parameter it stores only `exp_avg` and `exp_avg_sq`, in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        # Megatron reads this attribute. None means that Megatron stores the float32 weights.
        self.master_weights = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                group["step"] = int(group.get("step", 0)) + 1
            for param in params:
                self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        grad = param.grad.float()
        if group["weight_decay"] and not self.adam_w_mode:
            grad = grad.add(param, alpha=group["weight_decay"])
        exp_avg = state["exp_avg"].lerp_(grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(correction2**0.5).add_(group["eps"])
        if group["weight_decay"] and self.adam_w_mode:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(exp_avg, denominator, value=-group["lr"] / correction1)
