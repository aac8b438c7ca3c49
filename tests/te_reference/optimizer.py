"""Adam and norms over lists of tensors."""

from __future__ import annotations

import torch

__all__ = [
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
]

Lists = list[list[torch.Tensor]]


def multi_tensor_adam(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Run Adam (mode 0) or AdamW (mode 1) on gradients, parameters, both moments and, if any, float32 weights."""
    if noop.item():
        return
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, m, v, *master in zip(*lists, strict=True):
        g, value = gradient.float(), (master[0] if master else parameter).float()
        if mode == 0:
            g = g + weight_decay * value
        m.copy_(beta1 * m.float() + (1 - beta1) * g)
        v.copy_(beta2 * v.float() + (1 - beta2) * g * g)
        change = (m.float() / first) / ((v.float() / second).sqrt() + epsilon)
        if mode == 1:
            change = change + weight_decay * value
        for target in (parameter, *master):
            target.copy_(value - lr * change)


def multi_tensor_l2norm(
    chunk_size: int, noop: torch.Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of all tensors together [1] and, if `per_tensor`, the norm of each tensor [n]."""
    squares = torch.stack([tensor.float().square().sum() for tensor in lists[0]])
    return squares.sum().sqrt().view(1), squares.sqrt() if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk_size: int, noop: torch.Tensor, lists: Lists, scale: float) -> None:
    """Set the second list to `scale` times the first. If a value is not finite, set `noop` to 1."""
    for source, target in zip(*lists, strict=True):
        if not torch.isfinite(source).all():
            noop.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, noop: torch.Tensor, lists: Lists, scale: torch.Tensor) -> None:
    """Do the same with a factor on the GPU."""
    multi_tensor_scale(chunk_size, noop, lists, float(scale))
