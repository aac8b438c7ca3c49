"""Build the policy with Megatron-Core from a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import alignment
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.expert_load import ExpertLoad
from a2tgpo.model.experts import check_router_settings, has_experts, is_expert, is_router
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.layer_spec import decoder_spec
from a2tgpo.model.lora import attach_adapters
from a2tgpo.model.policy import Policy
from a2tgpo.model.precision import require_number_formats, spec_provider, uses_transformer_engine
from a2tgpo.model.rope import rope_of
from a2tgpo.model.router_balance import RouterBalance
from a2tgpo.model.router_replay import RouterReplay
from a2tgpo.model.transformer_config import DTYPES, check_layout, padded_vocab_size, transformer_config
from a2tgpo.model.weights import load_hf_weights, make_bridge
from a2tgpo.parallel.groups import ParallelGroups

__all__ = ["Policy", "build_policy"]


def build_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    *,
    update: UpdateConfig | None,
    trainable: bool = True,
    with_weights: bool = True,
    router_replay: bool = False,
) -> Policy:
    """Build this rank's part of the checkpoint in `model.path` and load its weights. Every rank must call this.

    Args:
        update: required if `trainable`.
        trainable: wrap the chunks in DistributedDataParallel, so that `get_megatron_optimizer` accepts them. If
            False, the parameters have no gradients.
        with_weights: read the weights. If False, the weights stay as Megatron initialises them. A model with adapters
            always reads its weights, because its checkpoints have only the adapters.
        router_replay: make the routers choose the `experts` of packed batches that have them.

    Raises:
        ConfigError: if the checkpoint is missing, malformed or unsupported, if the layout does not divide the model,
            or if this machine does not support the layer specification.
    """
    assert update is not None or not trainable, "a trainable policy needs an UpdateConfig"
    hf_config = load_hf_config(model.path)
    check_layout(hf_config, parallel, model.fp8)
    transformer_engine = uses_transformer_engine(model.layer_spec)
    config = transformer_config(hf_config, model, parallel, transformer_engine=transformer_engine)
    if transformer_engine:
        require_number_formats(model.dtype, model.fp8)
    gpt_models = _gpt_models(model, hf_config, config, groups)
    adapters = None
    if model.lora.enabled:
        adapters = attach_adapters(gpt_models, model.lora, hf_config, config, groups)
    policy = Policy(
        chunks=[Float16Module(config, gpt) if config.bf16 else gpt for gpt in gpt_models],
        transformer_config=config,
        hf_config=hf_config,
        bridge=make_bridge(hf_config, config, padded_vocab_size=gpt_models[0].vocab_size),
        groups=groups,
        path=model.path,
        dtype=DTYPES[model.dtype],
        vocab_size=hf_config.vocab_size,
        alignment=alignment(parallel, model.fp8),
        trainable=trainable,
        adapters=adapters,
    )
    if router_replay:
        policy.router_replay = RouterReplay(
            gpt_models,
            groups,
            shape=ExpertShape.of(hf_config),
            sequence_parallel=config.sequence_parallel,
            recomputes=config.recompute_granularity == "full",
        )
    # Load before wrapping, because the distributed optimizer copies its float32 weights from the model.
    if with_weights or adapters is not None:
        load_hf_weights(policy)
    if update is not None and trainable:
        check_router_settings(update, hf_config)
        if has_experts(hf_config):
            _prepare_experts(policy, update)
        overlap = groups.device.type == "cuda" and groups.dp_cp_group.size() > 1
        wrap_for_training(policy, update, overlap=overlap)
    else:
        for chunk in policy.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
    return policy


def _gpt_models(
    model: ModelConfig, hf_config: PretrainedConfig, config: TransformerConfig, groups: ParallelGroups
) -> list[GPTModel]:
    """Return the chunks of this rank's pipeline stage. The first chunk has the earliest layers."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    vp_stages = [None] if num_chunks is None else range(num_chunks)
    return [_gpt_model(model, hf_config, config, groups, vp_stage=vp_stage) for vp_stage in vp_stages]


def _gpt_model(
    model: ModelConfig,
    hf_config: PretrainedConfig,
    config: TransformerConfig,
    groups: ParallelGroups,
    *,
    vp_stage: int | None,
) -> GPTModel:
    """Return one chunk of this rank's pipeline stage. `vp_stage` is None if the stage has only one chunk."""
    rope = rope_of(model.path, hf_config)
    chunk, num_chunks = vp_stage or 0, config.virtual_pipeline_model_parallel_size or 1
    gpt_model = GPTModel(
        config,
        decoder_spec(config, spec_provider(model.layer_spec), vp_stage=vp_stage),
        vocab_size=padded_vocab_size(hf_config.vocab_size, groups.tp_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=groups.is_pipeline_first and chunk == 0,
        post_process=groups.is_pipeline_last and chunk == num_chunks - 1,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.base,
        vp_stage=vp_stage,
    ).to(groups.device)
    rope.apply_to(gpt_model)
    for name, parameter in gpt_model.named_parameters():
        # The optimizer reads these attributes of every parameter, but layers set them only on split parameters.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        # Reduce an expert's gradient over all ranks that hold the expert. Without this attribute, Megatron 0.16 loses
        # the gradients from other tensor-parallel ranks' tokens if parallel.expert is 1.
        parameter.allreduce = not is_expert(name)
    return gpt_model


def _prepare_experts(policy: Policy, update: UpdateConfig) -> None:
    """Count the tokens of each expert in training passes, and freeze or balance the routers as `update` says."""
    config, models = policy.transformer_config, policy.gpt_models
    if update.freeze_router:
        for model in models:
            for name, parameter in model.named_parameters():
                if is_router(name):
                    parameter.requires_grad_(False)
    policy.expert_load = ExpertLoad(
        models,
        policy.groups,
        num_layers=config.num_layers,
        sequence_parallel=config.sequence_parallel,
    )
    if update.router_balance_coef:
        policy.router_balance = RouterBalance(
            models,
            policy.groups,
            coef=update.router_balance_coef,
            num_layers=config.num_layers,
            sequence_parallel=config.sequence_parallel,
            recomputes=config.recompute_granularity == "full",
        )


def wrap_for_training(
    policy: Policy, update: UpdateConfig, *, overlap: bool, bucket_size: int | None = None
) -> None:
    """Wrap each chunk in DistributedDataParallel and configure the pipeline schedule. Every rank must call this.

    Args:
        overlap: reduce the gradients during the backward pass. With the distributed optimizer, also gather the
            weights during the forward pass.
        bucket_size: number of parameters in a bucket. None: Megatron's default.
    """
    config = policy.transformer_config
    policy.chunks = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=update.distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap and update.distributed_optimizer,
                bucket_size=bucket_size,
            ),
            chunk,
            # A later chunk's gradients are reduced during the backward pass of earlier chunks, so only the first
            # chunk needs buckets.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(policy.chunks)
    ]
    for chunk in policy.chunks:
        accumulate_in_float32(chunk)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = _one_or_list([chunk.no_sync for chunk in policy.chunks])
    config.grad_sync_func = (
        _one_or_list([chunk.start_grad_sync for chunk in policy.chunks]) if overlap else None
    )


def accumulate_in_float32(chunk: Any) -> None:
    """Make Transformer Engine's linear layers add their weight gradients directly to the float32 buffer.

    By default these layers first round each micro-batch's gradient to the weights' dtype. `chunk` must be wrapped in
    DistributedDataParallel, which owns the buffer. Set the buffer to 0 before each pass, because a layer may
    overwrite the buffer instead of adding to it.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _one_or_list(functions: list[Any]) -> Any:
    """Return the element of a list with one element, or any other list unchanged. Megatron accepts a list only with
    interleaved stages."""
    return functions if len(functions) > 1 else functions[0]
