"""Building the policy on Megatron-Core from a Hugging Face checkpoint.

How to run the policy on a packed batch (see `forward.forward_packed`):

    policy = build_policy(config.model, config.parallel, groups, update=config.update)

    def forward_step(data_iterator, chunk):             # called by the schedule, once a micro-batch and chunk
        batch = next(data_iterator)
        output = forward_packed(chunk, batch.tokens, batch.positions, batch.cu_seqlens)
        return output, partial(loss, batch)             # loss runs after the last chunk only, output is there
                                                        # logits [T / cp, padded vocab / tp] in the model's dtype
    get_forward_backward_func()(forward_step_func=forward_step, data_iterator=[iter(batches) for _ in policy.chunks],
        model=policy.chunks, num_microbatches=len(batches), seq_length=1, micro_batch_size=1, forward_only=False)

`seq_length` is unused with `variable_seq_lengths` (pipeline > 1) and with one stage. Under interleaved stages the
number of micro-batches must be a multiple of the pipeline size. The trainer calls `update/forward_step.py`, which
fills up the number.
"""

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

from a2tgpo.batch.packing import alignment
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.experts import is_expert
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.layer_spec import decoder_spec
from a2tgpo.model.policy import Policy
from a2tgpo.model.precision import require_number_formats, spec_provider, uses_transformer_engine
from a2tgpo.model.rope import rope_of
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
) -> Policy:
    """Build this rank's part of the checkpoint in `model.path` and load its weights; every rank must call this.

    Args:
        update: states whether the optimizer is distributed; required when trainable.
        trainable: wrap in DistributedDataParallel, ready for `get_megatron_optimizer`. Otherwise (a reference
            model) parameters have no gradients.
        with_weights: read the weights; False: leave them as Megatron initialises them, for a caller that loads a
            checkpoint next.

    Raises:
        ConfigError: if the checkpoint is missing, malformed or unsupported, the layout does not divide the model, or
            this machine does not support the layer specification.
    """
    assert update is not None or not trainable, "a trainable policy needs an UpdateConfig"
    hf_config = load_hf_config(model.path)
    check_layout(hf_config, parallel, model.fp8)
    transformer_engine = uses_transformer_engine(model.layer_spec)
    config = transformer_config(hf_config, model, parallel, transformer_engine=transformer_engine)
    if transformer_engine:
        require_number_formats(model.dtype, model.fp8)
    gpt_models = _gpt_models(model, hf_config, config, groups)
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
    )
    # Before wrapping: the distributed optimizer copies its float32 weights from the model.
    if with_weights:
        load_hf_weights(policy)
    if update is not None and trainable:
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
    """Build the chunks of this rank's pipeline stage, earliest layers first."""
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
    """Build one chunk of this rank's pipeline stage; `vp_stage` is its number, None for the only chunk."""
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
        # Gradients of experts are reduced over the ranks that hold the same experts. Up to 0.16 Megatron does this
        # only with parallel.expert > 1, and would lose the gradients from other tensor-parallel ranks' tokens.
        parameter.allreduce = not is_expert(name)
    return gpt_model


def wrap_for_training(
    policy: Policy, update: UpdateConfig, *, overlap: bool, bucket_size: int | None = None
) -> None:
    """Wrap each chunk in DistributedDataParallel and configure the pipeline schedule; every rank must call this.

    Args:
        overlap: overlap the reduction of gradients, and with the distributed optimizer the gathering of weights, with
            computation, bucket by bucket. Useful where communication does not occupy the computing device.
        bucket_size: parameters in a bucket; None: Megatron's own choice.
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
            # The first chunk's gradients come last, so only its own buckets can overlap with them.
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
    """Make Transformer Engine's linear layers add weight gradients directly to the float32 buffer.

    By default these layers first round each micro-batch's gradient to the weights' dtype. The chunk must be wrapped
    in DistributedDataParallel, which owns the buffers. Megatron's own switch (`gradient_accumulation_fusion`) would
    include its own output layer, which needs APEX. The first micro-batch of a pass may overwrite instead of adding,
    so the buffer must be zero before each pass.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _one_or_list(functions: list[Any]) -> Any:
    """Return the list, or its only element: Megatron's schedules accept a list only under interleaved stages."""
    return functions if len(functions) > 1 else functions[0]
