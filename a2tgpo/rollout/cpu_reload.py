"""Reload weights in vLLM, also on a CPU, where the kernels use packed copies of the weights.

vLLM's own reload leaves some packed copies unchanged, so the engine would silently compute with old weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def reload_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load `weights` into the model of a vLLM worker that runs in this process."""
    model = worker.model_runner.get_model()
    on_cpu = worker.device.type == "cpu"
    if on_cpu:
        _forget_packed_experts(model)
    # Do not call the model runner's `reload_weights`, because it does not set vLLM's configuration. Kernels read the
    # configuration when they are rebuilt.
    worker.reload_weights(weights_iterator=weights)
    if on_cpu:
        _renew_tied_head(model)


def _forget_packed_experts(model: Any) -> None:
    """Make the next reload pack the experts again. Call this before the reload.

    vLLM packs experts only when it builds their kernel for the first time. A later reload would copy unpacked weights
    into the packed storage (vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, _setup_kernel).
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _renew_tied_head(model: Any) -> None:
    """Give a tied output head the embedding's packed weight, because a reload packs only the embedding."""
    head: Any = getattr(model, "lm_head", None)
    embedding = model.model.embed_tokens
    if head is not embedding and getattr(head, "weight", None) is embedding.weight:
        head.cpu_linear = embedding.cpu_linear
