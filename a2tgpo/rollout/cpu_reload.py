"""What a reload of weights leaves undone in vLLM on a CPU, whose kernels use packed copies of them.

Without it the engine computes with wrong weights and says nothing.
"""

from __future__ import annotations

from typing import Any


def forget_packed_experts(model: Any) -> None:
    """Make a reload pack experts anew; called before it.

    vLLM packs them when it first builds their kernel only, and later copies unpacked weights into packed storage
    (vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, _setup_kernel).
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def repack_tied_head(model: Any) -> None:
    """Pack an output head that shares the embedding's weight, which the reload does not see; called after it."""
    head = getattr(model, "lm_head", None)
    embedding = model.model.embed_tokens
    if head is None or head is embedding:
        return
    if getattr(head, "weight", None) is embedding.weight:
        head.quant_method.process_weights_after_loading(head)
