"""Emulate the forward pass of linear layers in FP8 on any machine, by rounding as in Transformer Engine's recipes.

The operands are rounded to values of scaled FP8 numbers, then multiplied and summed in float32. The result is rounded
to the format of the layer's input. A tensor core with full accumulation computes in the same way, but sums in
another order. In recipes with one scale per tensor, an emulated scale covers one matrix in Hugging Face's layout, or
the input of one sequence. On a GPU a scale covers more values, because Megatron fuses matrices and packs sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EXPONENT_BITS = 0x7F800000
"""Mask of the exponent bits of a float32. Applied to a positive value, it rounds down to a power of two."""


@dataclass(frozen=True)
class Format:
    """A signed floating point format with gradual underflow. Values that are too large become its largest number."""

    mantissa_bits: int
    min_exponent: int
    """Smallest exponent of normal numbers. All smaller numbers have the same spacing."""
    largest: float


E4M3 = Format(mantissa_bits=3, min_exponent=-6, largest=448.0)
E5M2 = Format(mantissa_bits=2, min_exponent=-14, largest=57344.0)


@dataclass(frozen=True)
class Recipe:
    """How to scale the operands of a linear layer into FP8.

    A block (rows, channels) is the set of values that share a scale. If a block is None, all values share one scale.
    """

    format: Format
    input_block: tuple[int, int] | None
    weight_block: tuple[int, int] | None
    power_of_two: bool
    """Whether scales are powers of two, which is Transformer Engine's default for scales per block."""


_TENSORWISE = Recipe(E4M3, input_block=None, weight_block=None, power_of_two=False)
_BLOCKWISE = Recipe(E4M3, input_block=(1, 128), weight_block=(128, 128), power_of_two=True)
RECIPES = {
    "e4m3-tensorwise": _TENSORWISE,
    "e4m3-blockwise": _BLOCKWISE,
    "e4m3-mxfp8": Recipe(E4M3, input_block=(1, 32), weight_block=(1, 32), power_of_two=True),
    "e5m2-tensorwise": replace(_TENSORWISE, format=E5M2),
    "e5m2-blockwise": replace(_BLOCKWISE, format=E5M2),
}
"""The recipes of `model.fp8.recipe`, and recipes with e5m2 for comparison."""


def round_to(values: Tensor, number_format: Format) -> Tensor:
    """Round finite float32 values to the nearest number of `number_format`, ties to even."""
    power = (values.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp(min=2.0**number_format.min_exponent) * 2.0**-number_format.mantissa_bits
    rounded = torch.round(values / step) * step  # only `round` changes digits, because step is a power of two
    return rounded.clamp(-number_format.largest, number_format.largest)


def quantise(
    values: Tensor, number_format: Format, block: tuple[int, int] | None, *, power_of_two: bool
) -> Tensor:
    """Round `values` as FP8 does: scale each block so that its largest value fits the format, round, and scale back.

    Args:
        values: [rows, channels] float32. The result has the same shape and dtype.
        block: numbers of rows and channels that share a scale. If it is None, all values share one scale.
        power_of_two: whether a block's scale is the largest power of two that does not overflow.
    """
    rows, channels = values.shape
    high, wide = block or (max(rows, 1), max(channels, 1))
    padded = F.pad(values, (0, -channels % wide, 0, -rows % high))
    blocks = padded.view(padded.size(0) // high, high, padded.size(1) // wide, wide)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(largest > 0, number_format.largest / largest, 1.0)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    result = round_to(blocks * scale, number_format) * (1 / scale)
    return result.view(padded.shape)[:rows, :channels]


class EmulatedLinear(nn.Module):
    """The forward pass of `linear` with input and weight quantised as in `recipe`. It has no backward pass."""

    def __init__(self, linear: nn.Linear, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.weight = quantise(
            linear.weight.detach().float(),
            recipe.format,
            recipe.weight_block,
            power_of_two=recipe.power_of_two,
        )
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        recipe = self.recipe
        rows = quantise(
            x.flatten(0, -2).float(), recipe.format, recipe.input_block, power_of_two=recipe.power_of_two
        )
        return F.linear(rows, self.weight, self.bias).view(*x.shape[:-1], -1).to(x.dtype)


@contextmanager
def emulated(decoder: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Replace all linear layers of `decoder` by `EmulatedLinear` inside the `with` statement."""
    replaced = [
        (module, name, child)
        for module in decoder.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    try:
        for module, name, child in replaced:
            setattr(module, name, EmulatedLinear(child, recipe))
        yield
    finally:
        for module, name, child in replaced:
            setattr(module, name, child)
