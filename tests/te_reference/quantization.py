"""FP8 quantisation: scale values into the range of e4m3 or e5m2, and round them, as Transformer Engine's quantizers
specify.

A quantised tensor has up to two copies. Rowwise data is for products that sum over the last dimension. Columnwise
data is transposed, for products in the other direction. The quantizer's own Python code defines which copies exist
and their memory layout (`inner_tensor_specs`, `storage_metadata`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "bgrad_quantize",
    "create_empty_quantized_tensor",
    "fp8_transpose",
    "quantize",
    "split_quantize",
    "swap_first_dims",
]

TORCH_DTYPES = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}
"""Maps the number of the extension's DType to a torch.dtype."""
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
BLOCK = 128
_COPIES = (
    "_rowwise_data",
    "_rowwise_scale_inv",
    "_columnwise_data",
    "_columnwise_scale_inv",
    "_data",
    "_transpose",
)


def torch_dtype(dtype: Any) -> torch.dtype:
    """Return the torch.dtype of a DType, of its number, or of a torch.dtype."""
    return dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES[int(getattr(dtype, "value", dtype))]


def scale_of(amax: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Return the factors [...] float32 with which `amax` becomes the largest number of the format.

    A factor is 1 if amax is 0 or not finite. If the recipe requires powers of two, it is the next lower power.
    """
    amax = amax.float().clamp_min(quantizer.amax_epsilon)
    scale = LARGEST[torch_dtype(quantizer.dtype)] / amax
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), 1.0, scale)
    if quantizer.force_pow_2_scales:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return scale


def cast(scaled: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Round to the quantizer's format with saturation, and return bytes."""
    dtype = torch_dtype(quantizer.dtype)
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).view(torch.uint8)


def quantize(
    tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None
) -> Any:
    """Return the copies of `tensor` [..., K] that the quantizer keeps, written to `output` if it is given."""
    if noop is not None and noop.item() != 0:
        return output
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype)
    else:
        _keep_copies(output, quantizer, tensor.shape)
    values = tensor.detach().reshape(-1, tensor.size(-1)).float()  # [M, K]
    fill = {"Float8BlockQuantizer": _fill_blocks, "Float8CurrentScalingQuantizer": _fill_tensor}
    fill[type(quantizer).__name__](values, quantizer, output)
    return output


def _fill_blocks(values: torch.Tensor, quantizer: Any, output: Any) -> None:
    """Quantise blockwise, with one scale for each block of 1 x 128 (activations, gradients) or 128 x 128
    (weights).
    """
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    for matrix, data, scales in (
        (values, output._rowwise_data, output._rowwise_scale_inv),
        (values.t().contiguous(), output._columnwise_data, output._columnwise_scale_inv),
    ):
        if data is not None and matrix.numel():
            quantized, inverse = _blocks(matrix, quantizer, height)
            data.copy_(quantized.view(data.shape))
            scales.zero_()  # the tensor may be padded at the end of each dimension
            scales[: inverse.size(0), : inverse.size(1)] = inverse


def _blocks(matrix: torch.Tensor, quantizer: Any, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes [M, K] and inverse scales [M / 128, K / 128]. For blocks of one row, the scales are transposed: [K
    / 128, M].
    """
    m, k = matrix.shape
    padded = F.pad(matrix, (0, -k % BLOCK, 0, -m % height))
    tiles = padded.view(padded.size(0) // height, height, -1, BLOCK)
    scale = scale_of(tiles.abs().amax((1, 3)), quantizer)
    data = cast(tiles * scale[:, None, :, None], quantizer).view(padded.shape)[:m, :k]
    inverse = 1.0 / scale
    return data, inverse if height == BLOCK else inverse.t()


def _fill_tensor(values: torch.Tensor, quantizer: Any, output: Any) -> None:
    """Quantise tensorwise, with one scale from the largest magnitude. If the quantizer requires it, the largest
    magnitude is over all ranks that share the tensor.
    """
    amax = values.abs().amax() if values.numel() else values.new_zeros(())
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    scale = scale_of(amax, quantizer)
    data = cast(values * scale, quantizer)
    output._scale_inv.fill_(1.0 / scale)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data.t().reshape(output._transpose.shape))
        output._transpose_invalid = False


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: Any, device: Any = None, pin_memory: bool = False
) -> Any:
    """Return a quantised tensor of [*shape] with memory for the copies that the quantizer keeps."""
    shape, dtype = tuple(shape), torch_dtype(dtype)
    metadata = quantizer.storage_metadata(dtype)
    made, keywords = metadata["cls"], dict(metadata["nontensor_kwargs"])
    tensors = {
        name: torch.zeros(size, dtype=kind)
        for name, (size, kind) in quantizer.inner_tensor_specs(shape).items()
    }
    if "Blockwise" in made.__name__:
        keywords |= {name.removeprefix("_"): tensors.get(name) for name in _COPIES[:4]}
    else:
        keywords |= {
            "data": tensors.get("_data"),
            "data_transpose": tensors.get("_transpose"),
            "fp8_scale_inv": tensors.get("_scale_inv"),
        }
    if not made.__name__.endswith("Storage"):  # a class that is also a torch.Tensor
        keywords |= {
            "shape": shape,
            "dtype": keywords.pop("fake_dtype", dtype),
            "device": torch.device("cpu"),
            "requires_grad": False,
        }
    return made(**keywords)


def _keep_copies(output: Any, quantizer: Any, shape: Any) -> None:
    """Give `output` memory for the copies that the quantizer keeps, and remove all other copies."""
    kept = quantizer.inner_tensor_specs(tuple(shape))
    for name in _COPIES:
        if name not in kept and getattr(output, name, None) is not None:
            setattr(output, name, None)
        elif name in kept and getattr(output, name) is None:
            size, kind = kept[name]
            setattr(output, name, torch.zeros(size, dtype=kind))
    if hasattr(output, "_transpose_invalid"):
        output._transpose_invalid = output._transpose is None


def split_quantize(
    tensor: torch.Tensor,
    split_sections: list[int],
    quantizers: list[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Return each expert's rows of `tensor`, quantised by the expert's quantizer."""
    parts = tensor.split(list(split_sections))
    return [quantize(part.contiguous(), by) for part, by in zip(parts, quantizers, strict=True)]


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """Return the gradient of a bias, [K] summed over the rows of [..., K], and the quantised rows."""
    return tensor.reshape(-1, tensor.size(-1)).float().sum(0).to(tensor.dtype), quantize(tensor, quantizer)


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None) -> torch.Tensor:
    """Transpose bytes [..., K] to [K, ...]."""
    moved = data.permute(data.dim() - 1, *range(data.dim() - 1)).contiguous()
    return moved if out is None else out.copy_(moved.view(out.shape))


def swap_first_dims(tensor: torch.Tensor, *, out: torch.Tensor | None) -> torch.Tensor:
    """Transpose [ranks, K, ...] to [K, ranks, ...]. This brings gathered columnwise data into the order of the whole
    tensor.
    """
    moved = tensor.transpose(0, 1).contiguous()
    return moved if out is None else out.copy_(moved)
