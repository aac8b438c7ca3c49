"""Matrix products of many experts' rows with the experts' weights, and the padding that FP8 needs."""

from __future__ import annotations

from typing import Any

import torch

from te_reference.products import product

__all__ = ["fused_multi_row_padding", "fused_multi_row_unpadding", "te_general_grouped_gemm"]


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[torch.Tensor],
    D_type: Any,
    m_splits: list[int],
    bias: list[torch.Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[Any],
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[torch.Tensor]:
    """Run `generic_gemm` on each expert's operands. For an expert without rows, the gradient of the weight is 0.

    Args:
        single_output: whether D is one tensor with the rows of all experts. `m_splits` gives the number of rows of
            each expert.
    """
    assert not any(part.numel() for part in bias)
    outputs = list(D[0].split(list(m_splits))) if single_output else D
    for a, b, output in zip(A, B, outputs, strict=True):
        if output.numel() == 0:
            continue
        if 0 in b.size():
            if not accumulate:
                output.zero_()
            continue
        result = product(a, transa, b, transb).view(output.shape)
        output.copy_(output.float() + result if accumulate else result)
    return bias


def fused_multi_row_padding(
    rows: torch.Tensor, output: torch.Tensor, sizes: list[int], padded_sizes: list[int]
) -> None:
    """Copy each expert's rows to the start of its part of `output`, with zeros after them."""
    output.zero_()
    parts = zip(rows.detach().split(list(sizes)), output.split(list(padded_sizes)), strict=True)
    for source, target in parts:
        target[: source.size(0)] = source


def fused_multi_row_unpadding(
    rows: torch.Tensor, output: torch.Tensor, padded_sizes: list[int], sizes: list[int]
) -> None:
    """Copy each expert's rows out of its padded part."""
    for source, target in zip(
        rows.detach().split(list(padded_sizes)), output.split(list(sizes)), strict=True
    ):
        target.copy_(source[: target.size(0)])
