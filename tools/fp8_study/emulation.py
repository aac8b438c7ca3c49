"""Emulate FP8 linear layers by rounding: the forward pass of Transformer Engine's recipes, on any machine.

Operands are rounded to the values of scaled FP8 numbers, multiplied and summed in float32, and the result is rounded
to the format of the layer's input, like a tensor core with full accumulation. Differences from a GPU run are the
order of summation and the extent of a scale per tensor. The emulated scale covers one matrix of Hugging Face's layout
and one sequence; Megatron fuses query, key and value, and gate and up, and training packs many sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EXPONENT_BITS = 0x7F800000
"""Mask of a float32's exponent bits; a value reduced to these bits is the largest power of two not above the
value.
"""


@dataclass(frozen=True)
class Format:
    """A signed floating point format with gradual underflow that saturates at its largest number."""

    mantissa_bits: int
    min_exponent: int
    """Smallest exponent of normal numbers; below it, the spacing stays constant."""
    largest: float


E4M3 = Format(mantissa_bits=3, min_exponent=-6, largest=448.0)
E5M2 = Format(mantissa_bits=2, min_exponent=-14, largest=57344.0)


@dataclass(frozen=True)
class Recipe:
    """How to scale a linear layer's operands into FP8, both in blocks (rows, channels); None: one block."""

    format: Format
    input_block: tuple[int, int] | None
    weight_block: tuple[int, int] | None
    power_of_two: bool
    """Scales are powers of two, Transformer Engine's default with blocks."""


_TENSORWISE = Recipe(E4M3, input_block=None, weight_block=None, power_of_two=False)
_BLOCKWISE = Recipe(E4M3, input_block=(1, 128), weight_block=(128, 128), power_of_two=True)
RECIPES = {
    "e4m3-tensorwise": _TENSORWISE,
    "e4m3-blockwise": _BLOCKWISE,
    "e4m3-mxfp8": Recipe(E4M3, input_block=(1, 32), weight_block=(1, 32), power_of_two=True),
    "e5m2-tensorwise": replace(_TENSORWISE, format=E5M2),
    "e5m2-blockwise": replace(_BLOCKWISE, format=E5M2),
}
"""Recipes of `model.fp8.recipe` (whose forward pass is e4m3 with either format), and e5m2 for comparison."""


def round_to(values: Tensor, number_format: Format) -> Tensor:
    """Round finite float32 values to the nearest of `number_format`, ties to even; same shape."""
    power = (values.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp(min=2.0**number_format.min_exponent) * 2.0**-number_format.mantissa_bits
    rounded = torch.round(values / step) * step  # exact except for the rounding: step is a power of two
    return rounded.clamp(-number_format.largest, number_format.largest)


def quantise(
    values: Tensor, number_format: Format, block: tuple[int, int] | None, *, power_of_two: bool
) -> Tensor:
    """Scale every block to the format's range by its largest value, round, and scale back.

    Args:
        values: [rows, channels] float32.
        block: rows and channels that share a scale; blocks at the end may be smaller. None: all values share one.
        power_of_two: use the largest power of two that does not overflow.

    Returns:
        [rows, channels] float32.
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
    """`linear` with input and weight quantised by `recipe`; forward only."""

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
    """Replace all linear layers of `decoder` by `EmulatedLinear` inside the `with` statement; the LM head keeps its
    precision.
    """
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
