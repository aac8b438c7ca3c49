"""Matrix products and RMSNorm, computed in float32 and rounded once to the requested type."""

from __future__ import annotations

from typing import Any

import torch

from te_reference.quantization import BLOCK, quantize, torch_dtype

__all__ = [
    "generic_gemm",
    "get_cublasLt_version",
    "get_num_cublas_streams",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
]

FP8_MULTIPLE = 16
"""cuBLASLt accepts FP8 operands if the size of the summed dimension is a multiple of this number."""


def get_cublasLt_version() -> int:
    return 130100  # the version of torch 2.13; from 13.4 on Transformer Engine would multiply experts in another way


def get_num_cublas_streams() -> int:
    return 4


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: torch.Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: torch.Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, torch.Tensor | None, None, None]:
    """Return (D, gradient of the bias), with D = alpha op(B) op(A) + bias, or D += ... if `accumulate`.

    With `grad`, `bias` requests the gradient of a bias, which is the sum of B over its rows.
    """
    assert not gelu and comm_overlap is None and beta in (None, 0.0, 1.0)
    result = product(A, transA, B, transB) * alpha
    bias_gradient = None
    if grad and bias is not None:
        bias_gradient = _operand(B, rowwise=False).sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    shape = list(result.shape) if transB else [*B.size()[:-1], result.size(-1)]
    if D is None:
        dtype = torch.bfloat16 if output_dtype is None else torch_dtype(output_dtype)
        D = result.view(shape).to(dtype)
        return (D if quantizer is None else quantize(D, quantizer)), bias_gradient, None, None
    assert quantizer is None
    D.copy_((D.float() + result.view(D.shape)) if accumulate else result.view(D.shape))
    return D, bias_gradient, None, None


def product(a: Any, transa: bool, b: Any, transb: bool) -> torch.Tensor:
    """Return op(B) op(A) in float32, which is cuBLAS's column-major A B read as row-major matrices."""
    assert hasattr(a, "_fp8_dtype") == hasattr(b, "_fp8_dtype"), (type(a), type(b))
    left, right = _operand(b, rowwise=not transb), _operand(a, rowwise=transa)
    return (left.t() if transb else left) @ (right.t() if transa else right)


def _operand(x: Any, *, rowwise: bool) -> torch.Tensor:
    """Return [rows, columns] float32 from the copy that a product along rows (or along columns) reads.

    Hopper multiplies FP8 only along rows, so the other direction needs the transposed copy. If it is missing, a GPU
    would read arbitrary memory.
    """
    if not hasattr(x, "_fp8_dtype"):
        return x.detach().reshape(-1, x.size(-1)).float()
    is_blockwise = hasattr(x, "_rowwise_data")
    names = ("_rowwise_data", "_columnwise_data") if is_blockwise else ("_data", "_transpose")
    data = getattr(x, names[0] if rowwise else names[1])
    assert data is not None, f"an operand without its {'rowwise' if rowwise else 'columnwise'} copy"
    assert rowwise or not getattr(x, "_transpose_invalid", False), "an operand with an outdated transpose"
    values = data.view(torch_dtype(x._fp8_dtype)).float()
    values = values.reshape(-1, data.size(-1)) if rowwise else values.reshape(data.size(0), -1)
    assert values.size(1) % FP8_MULTIPLE == 0, (
        f"an FP8 product over {values.size(1)} values: not a multiple of {FP8_MULTIPLE}"
    )
    if is_blockwise:
        scales = x._rowwise_scale_inv if rowwise else x._columnwise_scale_inv
        values = values * _spread(scales, values.shape, is_2d=x._is_2D_scaled)
    else:
        values = values * x._scale_inv
    return values if rowwise else values.t()


def _spread(scales: torch.Tensor, shape: torch.Size, *, is_2d: bool) -> torch.Tensor:
    """Return the inverse scale of each value, [M, K], from the inverse scales of the blocks."""
    m, k = shape
    if is_2d:
        grid = scales[: -(-m // BLOCK), : -(-k // BLOCK)]
        return grid.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]
    return scales[: -(-k // BLOCK), :m].t().repeat_interleave(BLOCK, 1)[:, :k]


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, torch.Tensor]:
    """Return (x / rms(x) weight [M, K], None, 1 / rms(x) [M]). The first is quantised if there is a quantizer."""
    assert not zero_centered_gamma
    inverse_rms = torch.rsqrt(x.detach().float().square().mean(-1) + eps)
    y = (x.detach().float() * inverse_rms[..., None] * weight.detach().float()).to(torch_dtype(otype))
    if quantizer is not None:
        return quantize(y, quantizer, ln_out), None, inverse_rms
    return (y if ln_out is None else ln_out.copy_(y)), None, inverse_rms


def rmsnorm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    inverse_rms: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x [M, K] and of the weight [K]."""
    normed = x.float() * inverse_rms[..., None]
    flow = dy.float() * weight.float()
    dx = inverse_rms[..., None] * (flow - normed * (flow * normed).mean(-1, keepdim=True))
    dweight = (dy.float() * normed).reshape(-1, x.size(-1)).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)
