"""From a Hugging Face configuration to Megatron's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from a2tgpo.config.check import ConfigError
from a2tgpo.config.fp8 import Fp8Config, LinearSizes, fp8_layout_fault
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.model.experts import check_expert_layout, expert_settings, has_experts
from a2tgpo.model.rope import rope_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

VOCAB_MULTIPLE = 128
"""Rows of the embedding are padded to a multiple of this, the same in every usual layout, so that a checkpoint
of one layout fits another."""


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig, fp8: Fp8Config) -> None:
    """Raise `ConfigError` unless the layout divides the model, into what FP8 can take if it is on."""
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
    """Rows of the embedding once padded; every tensor-parallel rank gets the same number."""
    return math.ceil(vocab_size / math.lcm(VOCAB_MULTIPLE, tensor_parallel)) * math.lcm(
        VOCAB_MULTIPLE, tensor_parallel
    )


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, *, transformer_engine: bool
) -> TransformerConfig:
    """Megatron's configuration of the checkpoint's architecture, laid out as `parallel` says.

    Dropout is off whatever the checkpoint says: the update must see the log-probs that the rollout had.

    Raises:
        ConfigError: for FP8 without Transformer Engine, which Megatron would run in bfloat16 without a word
            (megatron/core/fp8_utils.py, `get_fp8_context`).
    """
    if model.fp8.enabled and not transformer_engine:
        raise ConfigError(
            f"model.fp8.format is {model.fp8.format!r}; allowed here: none, since no GPU is seen and "
            f"model.layer_spec {model.layer_spec!r} then means layers without Transformer "
            "Engine; start on a GPU, or set model.fp8.format=none"
        )
    dtype = DTYPES[model.dtype]
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
        add_qkv_bias=hf_config.model_type == "qwen2",
        qk_layernorm=hf_config.model_type in ("qwen3", "qwen3_moe"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights come from the checkpoint. The initialisation itself must run, though: it is what marks
        # parameters as split over tensor-parallel ranks (megatron/core/tensor_parallel/layers.py:878).
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        cp_comm_type="p2p",  # Transformer Engine passes keys and values around a ring beside the computation
        # Micro-batches are packed to different lengths; stages tell each other the shape before the tensor.
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the default is refused beside the line above, experts or not
        # Under virtual stages Megatron frees an output right after its send was posted (schedules.py:1522). NCCL has
        # its stream hold the memory so long; gloo would send what stands there next.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        **expert_settings(hf_config, parallel, transformer_engine=transformer_engine),
        **_stages(parallel),
        **_fusions(transformer_engine),
        **_recompute(model.recompute),
        **_fp8(model.fp8),
    )


def _stages(parallel: ParallelConfig) -> dict[str, Any]:
    """Chunks and uneven stages; Megatron takes None for what is as usual."""
    first, last = parallel.first_stage_layers or None, parallel.last_stage_layers or None
    if parallel.pipeline == 2 and first and last:
        last = None  # it follows, and with no stage left between them Megatron divides by zero under virtual stages
    return {
        "virtual_pipeline_model_parallel_size": parallel.virtual if parallel.virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        # Two stages are each other's neighbours on both sides. In one batch Megatron would mix up what goes forward
        # and what goes backward between them; sent beside the computation, each travels by itself.
        "overlap_p2p_comm": parallel.virtual > 1,
        "batch_p2p_comm": parallel.virtual == 1,
    }


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _fusions(transformer_engine: bool) -> dict[str, Any]:
    """Fused kernels: what Transformer Engine and the compiler bring on a GPU, none elsewhere."""
    return {
        "bias_activation_fusion": transformer_engine,
        "bias_dropout_fusion": transformer_engine,
        "apply_rope_fusion": transformer_engine,
        "persist_layer_norm": transformer_engine,
        "masked_softmax_fusion": False,  # attention is Transformer Engine's or the twin's own
        # Megatron's own layers would need APEX for it; Transformer Engine's have it switched on one by one
        # (build.accumulate_in_float32).
        "gradient_accumulation_fusion": False,
    }


def _fp8(fp8: Fp8Config) -> dict[str, Any]:
    """What Megatron needs to know of FP8; the names are those of 0.16 and 0.19 alike.

    As long as weights are not kept in FP8, neither DistributedDataParallel nor the optimizer has to know.
    """
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
