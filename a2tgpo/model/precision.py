"""Which modules the layers are made of: Transformer Engine's, or their CPU twins.

The only module that looks for Transformer Engine.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from a2tgpo.config.check import ConfigError

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(layer_spec: str) -> bool:
    """Whether `model.layer_spec` means Transformer Engine on this machine.

    Raises:
        ConfigError: if it does, and Transformer Engine or the GPU it needs is not there.
    """
    has_gpu = torch.cuda.is_available()
    if layer_spec == "cpu" or (layer_spec == "auto" and not has_gpu):
        return False
    if not has_gpu:
        raise ConfigError(f"model.layer_spec is {layer_spec!r}, but no GPU is seen; allowed here: auto | cpu")
    if not HAVE_TE:
        raise ConfigError(
            f"model.layer_spec is {layer_spec!r}, but transformer_engine is not installed; "
            "install the gpu extra, or set model.layer_spec=cpu (slow)"
        )
    return True


def spec_provider(layer_spec: str) -> Any:
    """Megatron's `BackendSpecProvider` for `model.layer_spec`: names the module class for each part of a layer."""
    if uses_transformer_engine(layer_spec):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    from a2tgpo.model.cpu_layers import CpuSpecProvider

    return CpuSpecProvider()
