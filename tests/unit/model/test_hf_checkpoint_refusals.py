"""Checkpoints and layouts that cannot run are refused in one line that names the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.data.weight_files import weight_files, weight_shapes
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.build import build_policy
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.precision import uses_transformer_engine
from a2tgpo.model.rope import check_positions, rope_of
from a2tgpo.model.transformer_config import check_layout, padded_vocab_size
from a2tgpo.parallel.groups import ParallelGroups

Checkpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_hf_config(str(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("num_hidden_layers", 10**12, "tensor model.layers.999999999999.self_attn.q_proj.weight is missing"),
        ("vocab_size", 10**12, "disagree: model.embed_tokens.weight is "),
        ("intermediate_size", 10**12, "disagree: model.layers.1.mlp.gate_proj.weight is "),
        ("head_dim", 10**12, "disagree: model.layers.1.self_attn.q_proj.weight is "),
    ],
)
def test_sizes_past_those_of_the_weights_are_refused_before_anything_is_made(
    checkpoint: Checkpoint, name: str, size: int, says: str
) -> None:
    folder = checkpoint("qwen3")
    load_hf_config(str(folder))
    edit_config(folder, **{name: size})
    assert says in refusal(folder)


def test_missing_pieces_are_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)
    folder = checkpoint()
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 9, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert "model.safetensors is damaged: " in refusal(folder), length
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "model-1.safetensors is listed in model.safetensors.index.json but missing" in refusal(folder)
    for weight_map in ("[1]", '{"a": 3}', "null"):
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
        assert "model.safetensors.index.json lists no files by weight" in refusal(folder)


def test_only_the_files_that_the_index_lists_are_read(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3", tied=False)
    whole = load_file(folder / "model.safetensors")
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"not a tensor file")
    assert list(weight_files(str(folder))) == ["model.safetensors"]
    assert weight_shapes(str(folder)).keys() == whole.keys()
    names = sorted(whole)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: whole[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json, which does not list it; remove the wrong one" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert list(weight_files(str(folder))) == sorted(parts)
    assert weight_shapes(str(folder)).keys() == whole.keys()
    load_hf_config(str(folder))
    save_file({name: whole[name] for name in names[:1]}, folder / "model-2.safetensors")
    assert f"{names[0]} is in both model-1.safetensors and model-2.safetensors; remove" in refusal(folder)


def test_the_output_head_must_be_the_one_that_the_config_states(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", tied=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file)
    load_hf_config(str(folder))
    other = embedding.clone()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, file)
    assert "tie_word_embeddings true, but lm_head.weight differs from model.embed" in refusal(folder)
    edit_config(folder, tie_word_embeddings=False)
    load_hf_config(str(folder))
    save_file(tensors, file)
    assert "lm_head.weight is missing from its safetensors, and config.json has tie_word_" in refusal(folder)


def test_malformed_config_is_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    (folder / "config.json").write_text('{"model_type": "llama",')
    assert "is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "holds a list; allowed: a JSON object" in refusal(folder)


def yarn(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    } | changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral'; allowed: llama | mistral | qwen2 | qwen3 | qwen3_moe",
        ),
        ({"model_type": ["llama"]}, "model_type ['llama']; allowed: llama | mistral"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; allowed: silu"),
        ({"attention_bias": True}, "attention_bias true; allowed: false"),
        ({"mlp_bias": True}, "mlp_bias true; allowed: false"),
        ({"hidden_size": "many"}, "hidden_size 'many'; allowed: an integer >= 1"),
        ({"hidden_size": 64.5}, "hidden_size 64.5; allowed: an integer >= 1"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; allowed: an integer >= 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1; allowed: an integer >= 1"),
        ({"rope_parameters": "none"}, "config.json is malformed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config; allowed"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "rope scaling 'dynamic', whose frequencies change with the length of the sequence; allowed: default | "
            "linear | llama3 | yarn. To run without scaling",
        ),
        ({"rope_parameters": yarn(factor=None)}, "factor None; allowed: a number > 0"),
        ({"rope_parameters": yarn(factor="4")}, "factor '4'; allowed: a number > 0"),
        ({"rope_parameters": yarn(beta_fast=None)}, "beta_fast None; allowed: a number > 0"),
        ({"rope_parameters": yarn(attention_factor=-1.0)}, "attention_factor -1.0; allowed: a number > 0"),
    ],
)
def test_unsupported_option_is_named(checkpoint: Checkpoint, changes: dict, fault: str) -> None:
    folder = checkpoint()
    edit_config(folder, **changes)
    assert fault in refusal(folder)


def test_sliding_window_layers_are_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2")
    edit_config(folder, layer_types=["full_attention", "sliding_attention"], use_sliding_window=True)
    assert "sliding-window layers" in refusal(folder)
    folder = checkpoint("mistral")
    edit_config(folder, sliding_window=4096)
    assert "sliding-window layers; allowed: full attention" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers [0]; allowed: 1 and [], experts in every layer"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 and mlp_only_layers []; allowed: 1 and []"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9; allowed: 1 to the 8 experts"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob true with num_experts_per_tok 1"),
    ],
)
def test_experts_that_cannot_be_expressed_are_refused(
    checkpoint: Checkpoint, changes: dict, fault: str
) -> None:
    folder = checkpoint("qwen3_moe")
    edit_config(folder, **changes)
    assert fault in refusal(folder)


@pytest.mark.parametrize(
    ("architecture", "parallel", "fault"),
    [
        ("qwen3", ParallelConfig(expert=2), "parallel.expert is 2; allowed: 1, since a qwen3 model has no"),
        ("qwen3_moe", ParallelConfig(expert=3), "parallel.expert is 3; allowed: a divisor of the model's 8"),
        ("qwen3_moe", ParallelConfig(tensor=2, expert=2), "parallel.sequence is false; allowed: true where"),
    ],
)
def test_layout_must_suit_the_experts(
    checkpoint: Checkpoint, architecture: str, parallel: ParallelConfig, fault: str
) -> None:
    hf_config = load_hf_config(str(checkpoint(architecture)))
    with pytest.raises(ConfigError) as caught:
        check_layout(hf_config, parallel, Fp8Config())
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    check_layout(hf_config, ParallelConfig(tensor=2, sequence=True), Fp8Config())


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_theta"])
def test_rope_theta_is_found_in_new_and_old_configs(checkpoint: Checkpoint, spelling: str) -> None:
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    theta = {"rope_type": "default", "rope_theta": 123456.0} if spelling == "rope_parameters" else 123456.0
    (folder / "config.json").write_text(json.dumps(config | {spelling: theta}))
    rope = rope_of(str(folder), load_hf_config(str(folder)))
    assert rope.base == 123456.0 and rope.inverse_frequencies is None and rope.softmax_scale(32) is None


@pytest.mark.parametrize(
    ("changes", "longest", "way_out"),
    [
        ({}, 4096, "lower data.max_prompt_tokens"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 8192, "lower data."),
        (
            {"rope_parameters": yarn(original_max_position_embeddings=4096)},
            4096,
            "set max_position_embeddings to 16384 in config.json, as far as YaRN reaches, or lower",
        ),
        ({"max_position_embeddings": 16384, "rope_parameters": yarn()}, 16384, "lower data."),
    ],
)
def test_a_sequence_past_the_models_positions_is_refused(
    checkpoint: Checkpoint, changes: dict, longest: int, way_out: str
) -> None:
    folder = checkpoint()
    edit_config(folder, **changes)
    hf_config = load_hf_config(str(folder))
    check_positions(str(folder), hf_config, longest)
    with pytest.raises(ConfigError) as caught:
        check_positions(str(folder), hf_config, longest + 1)
    assert f"is {longest + 1}; allowed: at most the {longest} positions" in str(caught.value)
    assert way_out in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "fault"),
    [
        (
            ParallelConfig(tensor=3),
            "parallel.tensor is 3; allowed: a divisor of the model's 4 attention heads",
        ),
        (
            ParallelConfig(tensor=4),
            "parallel.tensor is 4; allowed: a divisor of the model's 2 key-value heads",
        ),
        (
            ParallelConfig(pipeline=3),
            "parallel.pipeline is 3; allowed: a divisor of the model's 2 layers, or others with "
            "parallel.first_stage_layers or parallel.last_stage_layers",
        ),
        (
            ParallelConfig(pipeline=2, virtual=2),
            "parallel.virtual is 2; allowed: a divisor of the 1 layers of a pipeline stage",
        ),
    ],
)
def test_layout_must_divide_the_model(checkpoint: Checkpoint, parallel: ParallelConfig, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(load_hf_config(str(checkpoint())), parallel, Fp8Config())
    assert str(caught.value) == fault


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"),
    [(250, 1, 256), (250, 2, 256), (256, 8, 256), (257, 1, 384), (257, 3, 384)],
)
def test_vocabulary_padding_fits_every_tensor_parallel_size(
    vocab_size: int, tensor: int, padded: int
) -> None:
    assert padded_vocab_size(vocab_size, tensor) == padded and padded % tensor == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU refuses")
def test_transformer_engine_without_a_gpu_is_refused() -> None:
    assert not uses_transformer_engine("auto") and not uses_transformer_engine("cpu")
    with pytest.raises(ConfigError, match=r"torch sees no GPU; allowed here: auto \| cpu$"):
        uses_transformer_engine("transformer_engine")


def test_weights_that_do_not_fit_the_config_are_refused(
    checkpoint: Checkpoint, groups: ParallelGroups
) -> None:
    def build(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            build_policy(
                ModelConfig(path=str(folder)), ParallelConfig(), groups, update=None, trainable=False
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = checkpoint("qwen3", tied=False)
    edit_config(folder, intermediate_size=96)
    assert "config.json and weights disagree: model.layers.1.mlp." in build(folder)
    edit_config(folder, intermediate_size=128, num_key_value_heads=1)
    assert "config.json and weights disagree: model.layers.0.self_attn." in build(folder)
    edit_config(folder, num_key_value_heads=2, num_hidden_layers=1, layer_types=["full_attention"])
    assert "has tensors that a qwen3 model does not use: model.layers.1." in build(folder)
    edit_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    assert "tensor model.layers.2." in build(folder)
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    assert "model.safetensors is damaged" in build(folder)
