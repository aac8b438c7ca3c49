"""Choose between Transformer Engine's modules and their CPU twins for the layers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from packaging.version import Version

from a2tgpo.config.fp8 import CAPABILITIES, Fp8Config, Recipe
from a2tgpo.io.errors import ConfigError

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None

FP8_NEEDS = {"tensorwise": ("2.2", "12.1"), "blockwise": ("2.3", "12.9"), "mxfp8": ("2.1", "12.8")}
"""The lowest versions of Transformer Engine and of CUDA for each recipe, from Transformer Engine's quantization.py
and from `get_fp8_recipe` in megatron/core/fp8_utils.py."""


def uses_transformer_engine(layer_spec: str) -> bool:
    """Return whether `model.layer_spec` selects Transformer Engine on this machine.

    Raises:
        ConfigError: if `layer_spec` requires Transformer Engine, but the package or a GPU is missing.
    """
    has_gpu = torch.cuda.is_available()
    if layer_spec == "cpu" or (layer_spec == "auto" and not has_gpu):
        return False
    if not has_gpu:
        raise ConfigError(
            f"model.layer_spec is {layer_spec!r}, but torch sees no GPU; allowed here: auto | cpu"
        )
    if not HAVE_TE:
        raise ConfigError(
            f"model.layer_spec is {layer_spec!r}, but transformer_engine is not installed; "
            "install the gpu extra, or set model.layer_spec=cpu (slow)"
        )
    return True


def require_number_formats(dtype: str, fp8: Fp8Config) -> None:
    """Raise `ConfigError` if the installed Transformer Engine does not support these number formats on this GPU."""
    if dtype == "float32":
        # In float32, Transformer Engine's attention would unpack a row into [segments, longest, ...] and keep
        # [segments, heads, longest, longest] scores per layer. With context parallelism, Transformer Engine has no
        # float32 attention.
        raise ConfigError(
            "model.dtype is 'float32'; allowed on GPUs: bfloat16, since the memory of Transformer Engine's attention "
            "in float32 grows with the square of the longest sequence, and parallel.context > 1 has none; "
            "model.layer_spec=cpu computes in float32 anywhere (slow)"
        )
    if fp8.enabled:
        require_fp8_needs(
            fp8.recipe,
            engine=importlib.metadata.version("transformer_engine"),
            capability=torch.cuda.get_device_capability(),
            cuda=torch.version.cuda or "0",
        )


def require_fp8_needs(recipe: Recipe, *, engine: str, capability: tuple[int, int], cuda: str) -> None:
    """Raise `ConfigError` if the versions or the GPU do not meet the recipe's requirements.

    Args:
        engine: version of Transformer Engine.
        capability: the GPU's compute capability, such as (9, 0) for Hopper.
        cuda: the version of CUDA for which torch was built.
    """
    need_engine, need_cuda = FP8_NEEDS[recipe]
    first, end = CAPABILITIES[recipe]
    for holds, has, need in (
        (
            first <= capability < end,
            f"a card of compute capability {capability[0]}.{capability[1]}",
            _cards(recipe),
        ),
        (Version(engine) >= Version(need_engine), f"Transformer Engine {engine}", f">= {need_engine}"),
        (Version(cuda) >= Version(need_cuda), f"CUDA {cuda}", f">= {need_cuda}"),
    ):
        if not holds:
            raise ConfigError(
                f"model.fp8.recipe is {recipe!r}, which this machine cannot compute: it has {has}, but needs "
                f"{need}; choose another recipe, or model.fp8.format=none"
            )


def _cards(recipe: Recipe) -> str:
    first, end = CAPABILITIES[recipe]
    return f">= {first[0]}.{first[1]}" + (f" and < {end[0]}.{end[1]}" if end < (99, 0) else "")


def spec_provider(layer_spec: str) -> Any:
    """Return the `BackendSpecProvider`, which names the module class of each layer part, for `model.layer_spec`."""
    if uses_transformer_engine(layer_spec):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    from a2tgpo.model.cpu_layers import CpuSpecProvider

    return CpuSpecProvider()
