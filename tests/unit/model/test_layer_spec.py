"""model/layer_spec.py builds the layer that Megatron itself builds for Transformer Engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.model.build import build_policy
from a2tgpo.model.cpu_layers import CpuSpecProvider
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.layer_spec import decoder_spec
from a2tgpo.model.transformer_config import transformer_config
from a2tgpo.parallel.groups import ParallelGroups


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_layer_is_megatrons_own_for_transformer_engine(
    architecture: str,
    checkpoint: Callable[..., Path],
    groups: ParallelGroups,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", CpuSpecProvider, raising=False)
    model = ModelConfig(path=str(checkpoint(architecture)))
    config = transformer_config(load_hf_config(model.path), model, ParallelConfig(), transformer_engine=False)
    experts = {"num_experts": 8, "moe_grouped_gemm": True} if architecture == "qwen3_moe" else {}
    theirs = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=architecture.startswith("qwen3"), **experts
    )
    mine = decoder_spec(config, CpuSpecProvider(), vp_stage=None).layer_specs
    assert len(mine) == 2
    # Megatron's map renames parameters of a fused MLP, which neither specification uses.
    theirs.submodules.sharded_state_dict_keys_map = mine[0].submodules.sharded_state_dict_keys_map
    assert contents(mine[0].submodules.mlp) == contents(theirs.submodules.mlp)
    theirs.submodules.mlp = mine[0].submodules.mlp
    assert mine[0] == theirs


def contents(spec: Any) -> Any:
    """Return a specification's classes and parts, to compare by value. Its functions compare by identity
    (Megatron-Core 0.17 and later).
    """
    if isinstance(spec, ModuleSpec):
        return spec.module, contents(spec.submodules), contents(spec.params)
    if isinstance(spec, functools.partial):
        made = getattr(spec.func, "__self__", spec.func)
        keywords = dict(spec.keywords)
        return made, contents(keywords.pop("submodules", None)), contents(keywords)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return {field.name: contents(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    return {name: contents(part) for name, part in spec.items()} if isinstance(spec, dict) else spec


def test_parameters_have_transformer_engines_names(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    """The expected names are listed from the Transformer Engine specification of the same model."""
    model = ModelConfig(path=str(checkpoint("qwen3", tied=False)))
    policy = build_policy(model, ParallelConfig(), groups, update=None, trainable=False)
    names = {name for name, _ in policy.gpt_models[0].named_parameters() if ".layers.1." not in name}
    layer = "decoder.layers.0."
    assert names == {
        "embedding.word_embeddings.weight",
        layer + "self_attention.linear_qkv.layer_norm_weight",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.q_layernorm.weight",
        layer + "self_attention.k_layernorm.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "mlp.linear_fc1.layer_norm_weight",
        layer + "mlp.linear_fc1.weight",
        layer + "mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


def test_experts_have_transformer_engines_names(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    """Grouped linear layers have one weight per expert, and the norm before the router is a separate module."""
    model = ModelConfig(path=str(checkpoint("qwen3_moe", tied=False)))
    policy = build_policy(model, ParallelConfig(), groups, update=None, trainable=False)
    layer = "decoder.layers.0."
    shapes = {name.removeprefix(layer): tuple(p.shape) for name, p in policy.gpt_models[0].named_parameters()}
    found = {name: shape for name, shape in shapes.items() if "mlp" in name and "layers" not in name}
    assert found == {
        "pre_mlp_layernorm.weight": (64,),
        "mlp.router.weight": (8, 64),
        **{f"mlp.experts.linear_fc1.weight{i}": (64, 64) for i in range(8)},
        **{f"mlp.experts.linear_fc2.weight{i}": (64, 32) for i in range(8)},
    }
