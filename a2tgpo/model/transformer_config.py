"""Convert a Hugging Face configuration to Megatron's configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.fp8 import Fp8Config, LinearSizes, fp8_layout_fault
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.experts import check_expert_layout, expert_settings, has_experts
from a2tgpo.model.rope import rope_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

VOCAB_MULTIPLE = 128
"""The embedding's number of rows is padded to a multiple of this number. All usual layouts then give the
embedding the same number of rows, so a checkpoint from one layout fits another layout."""


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig, fp8: Fp8Config) -> None:
    """Raise `ConfigError` if the layout does not divide the model evenly, or if FP8 does not support the layout."""
    split = [
        (hf_config.num_attention_heads, "attention heads"),
        (hf_config.num_key_value_heads, "key-value heads"),
    ]
    if not has_experts(hf_config):  # experts are not sliced
        split.append((hf_config.intermediate_size, "feed-forward channels"))
    for size, what in split:
        if size % parallel.tensor:
            raise ConfigError(
                f"parallel.tensor is {parallel.tensor}; allowed: a divisor of the model's {size} {what}"
            )
    parallel.stage_layers(hf_config.num_hidden_layers)
    check_expert_layout(hf_config, parallel)
    sizes = LinearSizes.of(hf_config)
    fault = fp8_layout_fault(fp8, parallel, sizes, num_layers=hf_config.num_hidden_layers)
    if fault is not None:
        raise ConfigError(fault)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the embedding's number of rows after padding, a multiple of the number of tensor-parallel ranks."""
    return math.ceil(vocab_size / math.lcm(VOCAB_MULTIPLE, tensor_parallel)) * math.lcm(
        VOCAB_MULTIPLE, tensor_parallel
    )


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, *, transformer_engine: bool
) -> TransformerConfig:
    """Return Megatron's configuration of the checkpoint's architecture in the layout `parallel`.

    Dropout is off, even if the checkpoint sets it, because the update must compute the same log-probs as the rollout.

    Raises:
        ConfigError: if FP8 is enabled without Transformer Engine. Megatron would then silently compute in bfloat16
            (megatron/core/fp8_utils.py, `get_fp8_context`).
    """
    if model.fp8.enabled and not transformer_engine:
        raise ConfigError(
            f"model.fp8.format is {model.fp8.format!r}; allowed here: none, since torch sees no GPU, and "
            f"model.layer_spec {model.layer_spec!r} then has no Transformer Engine layers; "
            "start on a GPU, or set model.fp8.format=none"
        )
    dtype, family = DTYPES[model.dtype], FAMILIES[hf_config.model_type]
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=hf_config.head_dim,
        softmax_scale=rope_of(model.path, hf_config).softmax_scale(hf_config.head_dim),
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=family.has_qkv_biases,
        qk_layernorm=family.has_qk_norms,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The weights come from the checkpoint. The initialisation must still run, because it marks the parameters
        # that are split over tensor-parallel ranks (megatron/core/tensor_parallel/layers.py:878).
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),  # see parallel/determinism.py
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        cp_comm_type="p2p",  # Transformer Engine passes keys and values around a ring during the computation
        # Packed micro-batches differ in length, so a stage must send a tensor's shape before the tensor.
        variable_seq_lengths=parallel.pipeline > 1,
        # Even without experts, variable_seq_lengths forbids the default dispatcher.
        moe_token_dispatcher_type="alltoall",
        # With virtual stages, Megatron frees an output right after it starts to send the output (schedules.py:1522).
        # NCCL keeps the buffer alive until it is sent, but gloo would send the data that has overwritten the buffer.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        **expert_settings(hf_config, parallel, transformer_engine=transformer_engine),
        **_stages(parallel),
        **_fusions(transformer_engine),
        **_recompute(model.recompute),
        **_fp8(model.fp8),
    )


def _stages(parallel: ParallelConfig) -> dict[str, Any]:
    """Return Megatron's settings for chunks and uneven stages. If a value is None, Megatron's default applies."""
    first, last = parallel.first_stage_layers or None, parallel.last_stage_layers or None
    if parallel.pipeline == 2 and first and last:
        # With two stages, `first` determines `last`. If both were set and stages were virtual, Megatron would divide
        # by 0, the number of middle stages.
        last = None
    return {
        "virtual_pipeline_model_parallel_size": parallel.virtual if parallel.virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        # In a virtual pipeline of two stages, each stage is both the previous and the next stage of the other. A
        # batched exchange would confuse activations with gradients. Overlapped exchanges send tensors separately.
        "overlap_p2p_comm": parallel.virtual > 1,
        "batch_p2p_comm": parallel.virtual == 1,
    }


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _fusions(transformer_engine: bool) -> dict[str, Any]:
    """Return the settings of fused kernels, which are used only with Transformer Engine."""
    return {
        "bias_activation_fusion": transformer_engine,
        "bias_dropout_fusion": transformer_engine,
        "apply_rope_fusion": transformer_engine,
        "persist_layer_norm": transformer_engine,
        "masked_softmax_fusion": False,  # Transformer Engine or its twin computes attention
        # If this were True, Megatron's own layers would need APEX. See build.accumulate_in_float32.
        "gradient_accumulation_fusion": False,
    }


def _fp8(fp8: Fp8Config) -> dict[str, Any]:
    """Return Megatron's FP8 settings. Weights are not stored in FP8, so the optimizer needs no FP8 settings."""
    if not fp8.enabled:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def _recompute(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
