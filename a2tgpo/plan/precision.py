"""Check whether a plan can use FP8, and predict how much memory FP8 takes."""

from __future__ import annotations

from a2tgpo.config.fp8 import CAPABILITIES, ENGINE_CAPABILITY, fp8_layout_fault, quantization_fault
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.parameters import linear_parameters

VALUE_BYTES = {"blockwise": 1 + 4 / 128, "tensorwise": 1.0, "mxfp8": 1 + 1 / 32}
"""FP8 recipe -> bytes per value, with scales, of an activation that a linear layer keeps for the backward pass."""
WEIGHT_BYTES = {"blockwise": 1 + 4 / 128**2, "tensorwise": 1.0, "mxfp8": 1 + 1 / 32}
"""FP8 recipe -> bytes per value of a weight's FP8 copy, including scales."""
WEIGHT_COPIES = 2
"""Number of FP8 copies of each weight: one for the forward pass, and a transposed copy for the backward pass.

The copies do not replace the bfloat16 weight (transformer_engine/pytorch/module/base.py, `_fp8_workspaces`).
"""
ENGINE_WEIGHT_BYTES = 1 + 4 / 128**2
"""Bytes per weight in a quantised engine, including scales."""


def precision_fault(config: RunConfig, dimensions: ModelDimensions, gpu: Gpu) -> str | None:
    """Return one line that says why `config` cannot use FP8 with this GPU, model and layout; None if it can."""
    fp8, quantization = config.model.fp8, config.rollout.quantization
    if fp8.enabled:
        first, end = CAPABILITIES[fp8.recipe]
        if not first <= gpu.capability < end:
            able = [name for name, (low, high) in CAPABILITIES.items() if low <= gpu.capability < high]
            instead = f"recipe {' | '.join(able)}" if able else "model.fp8.format none"
            return f"model.fp8.recipe is {fp8.recipe!r}; allowed on {gpu.name}: {instead}"
    if quantization != "none" and gpu.capability < ENGINE_CAPABILITY:
        return f"rollout.quantization is {quantization!r}; allowed on {gpu.name}, which has no FP8: none"
    sizes = dimensions.linear_sizes
    return fp8_layout_fault(fp8, config.parallel, sizes, num_layers=dimensions.layers) or quantization_fault(
        quantization, config.rollout.tensor_parallel, sizes
    )


def fp8_copy_bytes(config: RunConfig, dimensions: ModelDimensions, stage: int) -> float:
    """Return the bytes of the weights' FP8 copies on a rank of pipeline stage `stage`, or 0 if FP8 is off."""
    fp8, parallel = config.model.fp8, config.parallel
    if not fp8.enabled:
        return 0.0
    layers = parallel.stage_layers(dimensions.layers)[stage] - fp8.bf16_layers(stage, parallel.pipeline)
    elements = layers * linear_parameters(dimensions, parallel.tensor, parallel.expert)
    return WEIGHT_COPIES * WEIGHT_BYTES[fp8.recipe] * elements
