"""Mixtures of experts: supported checkpoints, routing, layout and parameter names."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError, require

_PREFIX = ".mlp.experts."
_ROUTER = ".mlp.router."


def has_experts(hf_config: PretrainedConfig) -> bool:
    """Return whether the feed-forward layers are mixtures of experts."""
    return FAMILIES[hf_config.model_type].has_experts


def refuse_unsupported_experts(where: str, hf_config: PretrainedConfig) -> None:
    """Raise `ConfigError` if Megatron would compute the mixture differently from transformers."""
    if hf_config.decoder_sparse_step != 1 or hf_config.mlp_only_layers:
        raise ConfigError(
            f"{where} decoder_sparse_step {hf_config.decoder_sparse_step} and mlp_only_layers "
            f"{hf_config.mlp_only_layers}; allowed: 1 and [], experts in every layer"
        )
    chosen, experts = hf_config.num_experts_per_tok, hf_config.num_experts
    if not 1 <= chosen <= experts:
        raise ConfigError(f"{where} num_experts_per_tok {chosen}; allowed: 1 to the {experts} experts")
    if chosen == 1 and hf_config.norm_topk_prob:
        raise ConfigError(
            f"{where} norm_topk_prob true with num_experts_per_tok 1, which fixes the expert's weight at 1; "
            "allowed: norm_topk_prob false, or more experts per token"
        )


def check_expert_layout(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` if the layout does not fit the experts, or if a dense model has `parallel.expert` > 1."""
    if not has_experts(hf_config):
        if parallel.expert > 1:
            raise ConfigError(
                f"parallel.expert is {parallel.expert}; allowed: 1, since a {hf_config.model_type} model has no "
                "experts"
            )
        return
    if hf_config.num_experts % parallel.expert:
        raise ConfigError(
            f"parallel.expert is {parallel.expert}; allowed: a divisor of the model's {hf_config.num_experts} experts"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        # Without this check, Megatron would raise an error in the first training step (moe/moe_layer.py, forward).
        raise ConfigError(
            f"parallel.sequence is false; allowed: true where parallel.tensor ({parallel.tensor}) > 1 and the "
            "model has experts, otherwise every tensor-parallel rank would send them the same tokens"
        )


def check_router_settings(update: UpdateConfig, hf_config: PretrainedConfig) -> None:
    """Raise `ConfigError` if `update` has settings of routers, and the model has no experts."""
    if has_experts(hf_config):
        return
    why = f"since a {hf_config.model_type} model has no experts"
    if update.freeze_router:
        raise ConfigError(f"update.freeze_router is true; allowed: false, {why}")
    coef = update.router_balance_coef
    require(coef == 0, "update.router_balance_coef", coef, f"0, {why}")


def expert_settings(
    hf_config: PretrainedConfig, parallel: ParallelConfig, *, transformer_engine: bool
) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig for the experts. A dense model needs none.

    If `norm_topk_prob` is set, Qwen3 renormalises the softmax weights of the chosen experts. The result equals a
    softmax over the chosen experts' logits, which Megatron computes without `pre_softmax`. No token is dropped,
    because the update must compute with the same policy as the rollout. Megatron's own balancing losses are off,
    because their gradients depend on the layout (see `router_balance`).
    """
    if not has_experts(hf_config):
        return {}
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": transformer_engine,
        "expert_model_parallel_size": parallel.expert,
        # Experts are narrow, so each is kept whole. Tensor-parallel ranks can hold whole experts, but no slices.
        "expert_tensor_parallel_size": 1,
    }


def is_router(name: str) -> bool:
    """Return whether the Megatron parameter `name` belongs to a router."""
    return _ROUTER in name


def is_expert(name: str) -> bool:
    """Return whether the Megatron parameter `name` belongs to an expert."""
    return _PREFIX in name


def expert_names(name: str, *, experts_per_rank: int, num_ranks: int) -> list[str]:
    """Return, for each expert-parallel rank, the name of the expert parameter with the same local index as `name`."""
    stem, number = name.rsplit("weight", 1)
    place = int(number) % experts_per_rank
    return [f"{stem}weight{place + experts_per_rank * rank}" for rank in range(num_ranks)]
