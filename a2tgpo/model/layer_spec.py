"""Specify the decoder's module tree, for Transformer Engine and for its CPU twins."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def decoder_spec(
    config: TransformerConfig, provider: Any, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specification of a chunk's decoder on this pipeline stage, built from `provider`'s modules.

    An input norm is part of the linear layer after it (`linear_qkv.layer_norm_weight`).
    """
    qk_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    has_experts = config.num_moe_experts is not None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            # The router also reads the normalised hidden states, so this norm is a separate module.
            pre_mlp_layernorm=provider.layer_norm() if has_experts else IdentityOp,
            mlp=_experts(config, provider) if has_experts else _mlp(provider),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=provider.layer_norm())


def _mlp(provider: Any) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_layer_norm_linear(),
            linear_fc2=provider.row_parallel_linear(),
        ),
    )


def _experts(config: TransformerConfig, provider: Any) -> Any:
    """Return the specification of the router, the dispatcher and the grouped experts."""
    return get_moe_module_spec_for_backend(
        backend=provider, num_experts=config.num_moe_experts, moe_grouped_gemm=True
    )
