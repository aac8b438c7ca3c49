"""Operations of ring attention between its steps, on a rank's two pieces of each segment under context parallelism.

A rank has an early and a late piece of every segment, which are equally long. A "half" is the early (0) or the late
(1) pieces of all segments.
"""

from __future__ import annotations

import torch

__all__ = [
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
]


def _places(cu_seqlens: torch.Tensor, half: int) -> torch.Tensor:
    """Return the positions [n] int64 of the first (0) or the second (1) half."""
    places = [torch.arange(0)]
    for start, length in zip(cu_seqlens.tolist(), cu_seqlens.diff().tolist(), strict=False):
        places.append(torch.arange(length // 2) + start + half * (length // 2))
    return torch.cat(places)


def thd_read_half_tensor(tensor: torch.Tensor, cu_seqlens: torch.Tensor, half_idx: int) -> torch.Tensor:
    """Return one half of [t, h, d], or of keys and values together, [2, t, h, d]."""
    tokens = tensor.dim() - 3
    assert int(cu_seqlens[-1]) == tensor.size(tokens)
    return tensor.detach().index_select(tokens, _places(cu_seqlens, half_idx))


def thd_second_half_lse_correction(
    sums: torch.Tensor, step_sums: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool
) -> None:
    """Set the second half of `sums` [h, t] to log(exp(sums) + exp(step_sums))."""
    assert packed
    places = _places(cu_seqlens, 1)
    sums[:, places] = torch.logaddexp(sums[:, places], step_sums[:, : places.numel()])


def thd_read_second_half_lse(
    sums: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool, length: int
) -> torch.Tensor:
    """Return the second half of [h, t] as [h, length]."""
    assert packed
    half = sums.new_zeros(sums.size(0), length)
    places = _places(cu_seqlens, 1)
    half[:, : places.numel()] = sums[:, places]
    return half


def thd_out_correction(
    out: torch.Tensor,
    step_out: torch.Tensor,
    old_sums: torch.Tensor,
    sums: torch.Tensor,
    step_sums: torch.Tensor,
    cu_seqlens: torch.Tensor,
    only_second_half: bool,
    packed: bool,
) -> None:
    """Set `out` to out exp(old_sums - sums) + step_out exp(step_sums - sums), the mean over all keys so far."""
    assert packed and out.dtype == step_out.dtype
    places = _places(cu_seqlens, 1) if only_second_half else torch.arange(out.size(0))
    new = sums[:, places]
    kept = (old_sums[:, places] - new).exp().t()[..., None]
    added = (step_sums[:, : places.numel()] - new).exp().t()[..., None]
    step = step_out.reshape(-1, *out.shape[1:])[: places.numel()].float()
    out[places] = (out[places].float() * kept + step * added).to(out.dtype)


def thd_grad_correction(
    gradient: torch.Tensor, step: torch.Tensor, cu_seqlens: torch.Tensor, first: str, second: str
) -> None:
    """Add the step to each half of the gradient, copy the step, set the half to zero, or leave it unchanged
    ("none").
    """
    tokens = gradient.dim() - 3
    step_has_both = first in ("add", "copy") and second in ("add", "copy")
    for half, what in enumerate((first, second)):
        places = _places(cu_seqlens, half)
        if what == "zero":
            gradient.index_fill_(tokens, places, 0.0)
        elif what != "none":
            part = step.index_select(tokens, places) if step_has_both else step
            change = gradient.index_copy_ if what == "copy" else gradient.index_add_
            change(tokens, places, part.to(gradient.dtype))
