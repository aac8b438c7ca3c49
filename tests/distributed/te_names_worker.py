"""Every rank of test_transformer_engine_names.py runs this program, and rank 0 writes the results as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import te_reference

te_reference.install()

import torch.distributed as dist
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.models.gpt.gpt_model import GPTModel
from tiny_models import ARCHITECTURES

from a2tgpo.config.fp8 import TOKEN_MULTIPLES, Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.model.cpu_layers import CpuSpecProvider
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.layer_spec import decoder_spec
from a2tgpo.model.transformer_config import padded_vocab_size, transformer_config
from a2tgpo.model.weights import make_bridge
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.initialize import initialize, lay_out, shutdown


def main(checkpoints: Path, out: Path) -> None:
    found: dict[str, Any] = {"names": {}, "recipes": {}}
    initialize(ParallelConfig(), seed=0)
    layouts = {
        "tp1": ParallelConfig(),
        "tp2": ParallelConfig(tensor=2),
        "ep2": ParallelConfig(expert=2),
        "tp2-ep2": ParallelConfig(tensor=2, expert=2),
    }
    for layout, parallel in layouts.items():
        groups = lay_out(parallel, seed=0)
        for architecture in ARCHITECTURES if parallel.expert == 1 else ["qwen3_moe"]:
            path = str(checkpoints / architecture)
            mine = describe(path, parallel, transformer_engine=False)
            theirs = describe(path, parallel, transformer_engine=True)
            found["names"][f"{architecture}-{layout}"] = all_gather_object([mine, theirs], dist.group.WORLD)
    for recipe in TOKEN_MULTIPLES:
        for number_format in ("hybrid", "e4m3"):
            found["recipes"][f"{recipe}-{number_format}"] = describe_recipe(path, recipe, number_format)
    if groups.rank == 0:
        out.write_text(json.dumps(found))
    shutdown()


def describe(path: str, parallel: ParallelConfig, *, transformer_engine: bool) -> dict[str, Any]:
    """Return for each parameter its shape, dtype and split, and the Hugging Face tensors that it is made from."""
    hf_config = load_hf_config(path)
    config = transformer_config(
        hf_config,
        ModelConfig(path=path),
        parallel,
        transformer_engine=transformer_engine,
    )
    config.use_cpu_initialization = True
    provider = TESpecProvider() if transformer_engine else CpuSpecProvider()
    vocabulary = padded_vocab_size(hf_config.vocab_size, parallel.tensor)
    model = GPTModel(
        config,
        decoder_spec(config, provider, vp_stage=None),
        vocab_size=vocabulary,
        max_sequence_length=hf_config.max_position_embeddings,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
    )
    layer = model.decoder.layers[0]
    linears = layer.mlp.experts if config.num_moe_experts else layer.mlp
    for module in (layer.self_attention.linear_qkv, linears.linear_fc1, linears.linear_fc2):
        engine_made = type(module).__module__
        assert ("transformer_engine" in engine_made) == transformer_engine, engine_made
    bridge = make_bridge(hf_config, config, padded_vocab_size=vocabulary)
    return {
        name: [
            list(parameter.shape),
            str(parameter.dtype),
            [
                getattr(parameter, "tensor_model_parallel", False),
                getattr(parameter, "partition_dim", 0)
                if getattr(parameter, "tensor_model_parallel", False)
                else -1,
            ],
            bridge._weight_name_mapping_mcore_to_hf(name),
        ]
        for name, parameter in model.named_parameters()
    }


def describe_recipe(path: str, recipe: str, number_format: str) -> list[str]:
    """Return the class and the number format of the recipe for Transformer Engine. Check that Megatron 0.19 stores
    the given settings.
    """
    fp8 = Fp8Config(format=number_format, recipe=recipe, first_layers_bf16=1)
    config = transformer_config(
        load_hf_config(path), ModelConfig(path=path, fp8=fp8), ParallelConfig(), transformer_engine=True
    )
    assert (config.fp8, config.fp8_recipe) == (number_format, recipe)
    assert config.first_last_layers_bf16 and config.num_layers_at_start_in_bf16 == 1
    assert config.num_layers_at_end_in_bf16 == 0
    made = get_fp8_recipe(config)
    return [type(made).__name__, made.fp8_format.name]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
