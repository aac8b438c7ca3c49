"""Building the policy on Megatron-Core from a Hugging Face checkpoint.

How to run it, on a packed batch (see `forward.forward_packed`):

    policy = build_policy(config.model, config.parallel, groups, update=config.update)

    def forward_step(data_iterator, chunk):                     # called by the schedule, once a micro-batch
        batch = next(data_iterator)
        output = forward_packed(chunk, batch.tokens, batch.positions, batch.cu_seqlens)
        return output, partial(loss, batch)                     # loss runs on the last stage only, output is there
                                                                # logits [T, padded vocab / tp] in the model's dtype
    get_forward_backward_func()(forward_step_func=forward_step, data_iterator=iter(batches),
        model=policy.chunks[0], num_microbatches=len(batches), seq_length=1, micro_batch_size=1, forward_only=False)

`seq_length` is not used where `variable_seq_lengths` is set (pipeline > 1), nor where there is one stage. In the
loss, `token_logprobs(output, batch.targets[0], vocab_size=policy.vocab_size, tp_group=groups.tp_group)`.
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
from torch import nn
from transformers import PretrainedConfig

from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.experts import is_expert
from a2tgpo.model.hf_config import load_hf_config, rope_parameters
from a2tgpo.model.layer_spec import decoder_spec
from a2tgpo.model.policy import Policy
from a2tgpo.model.precision import check_fp8_support, spec_provider, uses_transformer_engine
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
) -> Policy:
    """Build this rank's part of the checkpoint in `model.path` and load its weights; every rank calls this.

    Args:
        update: says whether the optimizer is distributed; needed when trainable.
        trainable: wrap in DistributedDataParallel, ready for `get_megatron_optimizer`. Otherwise (a reference
            model) parameters take no gradient.

    Raises:
        ConfigError: if the checkpoint is missing, malformed or unsupported, the layout does not divide it, or
            the layer specification needs what this machine lacks.
    """
    assert update is not None or not trainable, "a trainable policy needs an UpdateConfig"
    hf_config = load_hf_config(model.path)
    check_layout(hf_config, parallel, model.fp8)
    config = transformer_config(
        hf_config, model, parallel, transformer_engine=uses_transformer_engine(model.layer_spec)
    )
    check_fp8_support(model.fp8)
    gpt_model = _gpt_model(model, hf_config, config, groups)
    policy = Policy(
        chunks=[Float16Module(config, gpt_model) if config.bf16 else gpt_model],
        transformer_config=config,
        hf_config=hf_config,
        bridge=make_bridge(hf_config, config, padded_vocab_size=gpt_model.vocab_size),
        groups=groups,
        path=model.path,
        dtype=DTYPES[model.dtype],
        vocab_size=hf_config.vocab_size,
        trainable=trainable,
    )
    # Before wrapping: the distributed optimizer copies its float32 weights from what it finds.
    load_hf_weights(policy)
    if update is not None and trainable:
        policy.chunks = [_data_parallel(config, chunk, groups, update) for chunk in policy.chunks]
        _hook_into_schedule(config, policy.chunks[0])
    else:
        for chunk in policy.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
    return policy


def _gpt_model(
    model: ModelConfig, hf_config: PretrainedConfig, config: TransformerConfig, groups: ParallelGroups
) -> GPTModel:
    rope = rope_parameters(model.path, hf_config)
    scaling: dict[str, Any] = {}
    if rope.llama3_factor is not None:
        scaling = {"rope_scaling": True, "rope_scaling_factor": rope.llama3_factor}
    gpt_model = GPTModel(
        config,
        decoder_spec(config, spec_provider(model.layer_spec)),
        vocab_size=padded_vocab_size(hf_config.vocab_size, groups.tp_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=groups.is_pipeline_first,
        post_process=groups.is_pipeline_last,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.base,
        seq_len_interpolation_factor=rope.interpolation,
        **scaling,
    ).to(groups.device)
    for name, parameter in gpt_model.named_parameters():
        # The optimizer reads these attributes of every parameter; layers set them on split ones only.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        # Gradients of experts are reduced over the ranks that hold the same ones. Up to 0.16 Megatron knows that with
        # parallel.expert > 1 only, and would lose what the tokens of other tensor-parallel ranks bring.
        parameter.allreduce = not is_expert(name)
    return gpt_model


def _data_parallel(
    config: TransformerConfig, chunk: nn.Module, groups: ParallelGroups, update: UpdateConfig
) -> DistributedDataParallel:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=update.distributed_optimizer,
        # Worth it where communication runs beside computation.
        overlap_grad_reduce=groups.device.type == "cuda" and groups.dp_size > 1,
    )
    return DistributedDataParallel(config, ddp_config, chunk)


def _hook_into_schedule(config: TransformerConfig, chunk: DistributedDataParallel) -> None:
    """Tell the pipeline schedule how gradients are held back, started and finished."""
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = chunk.no_sync
    if chunk.ddp_config.overlap_grad_reduce:
        config.grad_sync_func = chunk.start_grad_sync
