"""What a reload of weights leaves undone in vLLM on a CPU, whose kernels use packed copies of them.

Without it the engine computes with wrong weights and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def reload_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load `weights` into the model of a vLLM worker of this process, on a GPU or a CPU."""
    model = worker.model_runner.get_model()
    on_cpu = worker.device.type == "cpu"
    if on_cpu:
        _forget_packed_experts(model)
    # The worker's, not its model runner's: kernels that are built anew look for vLLM's configuration.
    worker.reload_weights(weights_iterator=weights)
    if on_cpu:
        _renew_tied_head(model)


def _forget_packed_experts(model: Any) -> None:
    """Make a reload pack experts anew; called before it.

    vLLM packs them when it first builds their kernel only, and later copies unpacked weights into packed storage
    (vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, _setup_kernel).
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _renew_tied_head(model: Any) -> None:
    """Give an output head that shares the embedding's weight the embedding's pack of it; called after a reload.

    The reload does not see such a head. The embedding, which looks rows up, is packed and has no use for it.
    """
    head: Any = getattr(model, "lm_head", None)
    embedding = model.model.embed_tokens
    if head is not embedding and getattr(head, "weight", None) is embedding.weight:
        head.cpu_linear = embedding.cpu_linear
