"""Planned parameters and optimizer state equal those that Megatron builds on every rank.

A fake process group stands in for the other ranks: this process acts as one rank after another and builds that rank's
model. Weights are never written, so even those of 70B models take no memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from tiny_models import ARCHITECTURES, build_model
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from a2tgpo.batch.packing import Alignment
from a2tgpo.config.load import load_config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model import build, transformer_config
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.lora import attach_adapters
from a2tgpo.model.policy import Policy
from a2tgpo.parallel import initialize
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.plan.adapters import stage_adapters
from a2tgpo.plan.dimensions import KNOWN_MODELS, ModelDimensions, layout_fault, read_dimensions
from a2tgpo.plan.memory import trainer_memory
from a2tgpo.plan.parameters import checkpoint_parameters, layer_parameters, stage_parameters
from a2tgpo.update.optimizer import build_optimizer

ROOT = Path(__file__).parents[3]
VOCAB = 250  # not a multiple of 128, so padded

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(context=2),
]
DEEPER_LAYOUTS = [
    ParallelConfig(pipeline=2, virtual=2),
    ParallelConfig(tensor=2, pipeline=2, virtual=3),
    ParallelConfig(pipeline=3, virtual=2),
    ParallelConfig(pipeline=2, first_stage_layers=2),
    ParallelConfig(pipeline=3, first_stage_layers=5, last_stage_layers=3),
    ParallelConfig(pipeline=2, virtual=2, first_stage_layers=4, last_stage_layers=8),
    ParallelConfig(pipeline=3, virtual=2, last_stage_layers=4),
]
"""Layouts of a model with 12 layers."""
EXPERT_LAYOUTS = [
    ParallelConfig(expert=2),
    ParallelConfig(tensor=2, sequence=True, expert=4),
    ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2),
]


@contextmanager
def in_place_of(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[ParallelGroups]:
    environment = dict(os.environ)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        # lay_out() would also create gloo groups, which the missing ranks would have to join.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield initialize._groups()
    finally:
        initialize.shutdown()
        os.environ.clear()
        os.environ.update(environment)


def gpt_models(
    hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups
) -> list[GPTModel]:
    config = transformer_config.transformer_config(hf_config, model, parallel, transformer_engine=False)
    return build._gpt_models(model, hf_config, config, groups)


def parameter_bytes(chunks: list[GPTModel]) -> int:
    return sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())


def hf_config_of(dimensions: ModelDimensions) -> PretrainedConfig:
    config_class, _ = ARCHITECTURES[dimensions.architecture]
    config = config_class(
        vocab_size=dimensions.vocab,
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.ffn,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        tie_word_embeddings=dimensions.tied,
    )
    config.head_dim = dimensions.head_dim
    if dimensions.experts:
        config.num_experts = dimensions.experts
        config.num_experts_per_tok = dimensions.experts_per_token
        config.moe_intermediate_size = dimensions.ffn
    return config


def least_ranks(parallel: ParallelConfig) -> int:
    """Return the ranks of one data-parallel replica, or of as many replicas as expert-parallel ranks need."""
    return parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_weights_of_a_real_checkpoint_are_counted_to_the_byte(architecture, tied, tmp_path):
    build_model(architecture, vocab_size=VOCAB, tied=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    dimensions = read_dimensions(str(tmp_path))
    model, hf_config = ModelConfig(path=str(tmp_path)), load_hf_config(str(tmp_path))
    for parallel in LAYOUTS + (EXPERT_LAYOUTS if architecture == "qwen3_moe" else []):
        world_size = least_ranks(parallel)
        for rank in range(world_size):
            with in_place_of(rank, world_size, parallel) as groups:
                built = parameter_bytes(gpt_models(hf_config, model, parallel, groups))
                planned = stage_parameters(dimensions, parallel, groups.pp_rank).total * 2
                assert planned == built, f"{parallel}, rank {rank}"


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_moe"])
def test_adapters_of_a_real_checkpoint_are_counted_to_the_byte(architecture, tmp_path):
    build_model(architecture, vocab_size=VOCAB, num_layers=4).to(torch.bfloat16).save_pretrained(tmp_path)
    dimensions, hf_config = read_dimensions(str(tmp_path)), load_hf_config(str(tmp_path))
    lora = LoraConfig(rank=4, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    model = ModelConfig(path=str(tmp_path), lora=lora)
    for parallel in LAYOUTS if architecture == "qwen2" else EXPERT_LAYOUTS:
        world_size = least_ranks(parallel)
        config = SimpleNamespace(model=model, parallel=parallel)
        for rank in range(world_size):
            with in_place_of(rank, world_size, parallel) as groups:
                chunks = gpt_models(hf_config, model, parallel, groups)
                whole = parameter_bytes(chunks)
                attach_adapters(chunks, lora, hf_config, chunks[0].config, groups)
                trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
                planned = stage_adapters(config, dimensions, groups.pp_rank)
                split = sum(p.numel() for p in trained if p.tensor_model_parallel)
                place = f"{parallel}, rank {rank}"
                assert planned.total == sum(p.numel() for p in trained), place
                assert planned.total * 2 == parameter_bytes(chunks) - whole, place
                assert planned.split == split, place


@pytest.mark.parametrize("parallel", DEEPER_LAYOUTS)
def test_chunks_and_uneven_stages_hold_all_layers_once_and_are_counted_to_the_byte(parallel, tmp_path):
    build_model("qwen2", vocab_size=VOCAB, tied=True, num_layers=12).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    dimensions = read_dimensions(str(tmp_path))
    model, hf_config = ModelConfig(path=str(tmp_path)), load_hf_config(str(tmp_path))
    world_size, places = least_ranks(parallel), {}
    for rank in range(world_size):
        with in_place_of(rank, world_size, parallel) as groups:
            chunks = gpt_models(hf_config, model, parallel, groups)
            planned = stage_parameters(dimensions, parallel, groups.pp_rank).total * 2
            assert planned == parameter_bytes(chunks), f"rank {rank}"
            for number, chunk in enumerate(chunks):
                assert chunk.pre_process == (groups.pp_rank == number == 0)
                assert chunk.post_process == (groups.is_pipeline_last and number == parallel.virtual - 1)
                numbers = [layer.layer_number for layer in chunk.decoder.layers]
                places[number, groups.pp_rank] = numbers
    # Layers are in the first chunks of all stages, then in the second chunks of all stages, and so on.
    assert [number for place in sorted(places) for number in places[place]] == list(range(1, 13))


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("qwen2.5-0.5b", ParallelConfig(tensor=2, pipeline=2, sequence=True)),
        ("qwen3-8b", ParallelConfig(tensor=2, sequence=True)),
        ("llama-3.1-8b", ParallelConfig(pipeline=4)),
        ("qwen2.5-72b", ParallelConfig(tensor=8, pipeline=4, sequence=True)),
        ("qwen2.5-72b", ParallelConfig(tensor=8, pipeline=4, virtual=5, sequence=True, context=2)),
        (
            "qwen2.5-72b",
            ParallelConfig(tensor=8, pipeline=4, first_stage_layers=19, last_stage_layers=19, sequence=True),
        ),
        ("llama-3.1-70b", ParallelConfig(tensor=4, pipeline=8, sequence=True)),
        ("llama-3.3-70b", ParallelConfig(tensor=8, pipeline=4, sequence=True)),
        ("qwen3-30b-a3b", ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=8)),
        ("qwen3-235b-a22b", ParallelConfig(expert=16)),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else f"tp{value.tensor}pp{value.pipeline}v{value.virtual}ep{value.expert}first{value.first_stage_layers}"
    ),
)
def test_weights_of_real_sizes_are_counted_to_the_byte(name, parallel):
    dimensions = KNOWN_MODELS[name]
    world_size = least_ranks(parallel)
    for rank in {0, world_size // 2, world_size - 1}:
        with in_place_of(rank, world_size, parallel) as groups:
            model = gpt_models(hf_config_of(dimensions), ModelConfig(path=name), parallel, groups)
            planned = stage_parameters(dimensions, parallel, groups.pp_rank).total * 2
            assert planned == parameter_bytes(model), f"rank {rank}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "whole"])
@pytest.mark.parametrize("expert", [0, 1, 2], ids=["dense", "experts", "shared_experts"])
def test_gradients_and_optimizer_state_are_counted(dtype, distributed, expert, tmp_path):
    architecture = "qwen3_moe" if expert else "qwen3"
    build_model(architecture, vocab_size=VOCAB, tied=True).to(torch.bfloat16).save_pretrained(tmp_path)
    dimensions, hf_config = read_dimensions(str(tmp_path)), load_hf_config(str(tmp_path))
    model = ModelConfig(path=str(tmp_path), dtype=dtype)
    parallel, data_parallel = ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=max(expert, 1)), 2
    update = UpdateConfig(distributed_optimizer=distributed)
    config = load_config(
        ROOT / "configs/train_8b.yaml",
        [
            f"model.dtype={dtype}",
            "parallel.pipeline=2",
            f"parallel.expert={parallel.expert}",
            f"update.distributed_optimizer={str(distributed).lower()}",
        ],
    )
    state_bytes: dict[int, int] = {0: 0, 1: 0}
    for rank in (0, 2, 4, 6):  # both replicas of both stages, first tensor-parallel rank
        with in_place_of(rank, 8, parallel) as groups:
            (gpt,) = gpt_models(hf_config, model, parallel, groups)
            policy = Policy(
                chunks=[gpt],
                transformer_config=gpt.config,
                hf_config=hf_config,
                bridge=None,
                groups=groups,
                path=str(tmp_path),
                dtype=transformer_config.DTYPES[dtype],
                vocab_size=VOCAB,
                alignment=Alignment(),
                trainable=True,
            )
            build.wrap_for_training(policy, update, overlap=False)
            planned = trainer_memory(config, dimensions, stage=groups.pp_rank, data_parallel=data_parallel)
            gradients = sum(p.main_grad.numel() * p.main_grad.element_size() for p in gpt.parameters())
            assert gradients == planned.gradients
            state_bytes[groups.pp_rank] += _state_bytes(policy, update)
    for stage, measured in state_bytes.items():
        planned = trainer_memory(config, dimensions, stage=stage, data_parallel=data_parallel)
        expected = data_parallel * (planned.master_weights + planned.moments)
        assert measured == pytest.approx(expected, rel=0.02), f"stage {stage}"


def _state_bytes(policy: Policy, update: UpdateConfig) -> int:
    """Return the bytes of the optimizer's tensors after a step, without weights that it shares with the model."""
    optimizer, _ = build_optimizer(policy, update, total_steps=1)
    policy.chunks[0].zero_grad_buffer()
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    total = 0
    shared = {p.untyped_storage().data_ptr() for p in policy.chunks[0].parameters()}
    for part in optimizer.chained_optimizers:
        held = [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
        held += [
            value
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.numel() > 1
        ]
        total += sum(
            tensor.numel() * tensor.element_size()
            for tensor in held
            if tensor.untyped_storage().data_ptr() not in shared
        )
    return total


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.3-70b", 70_553_706_496),
    ],
)
def test_built_in_dimensions_give_the_published_parameter_counts(name, published):
    assert checkpoint_parameters(KNOWN_MODELS[name]) == published


@given(
    name=st.sampled_from(sorted(KNOWN_MODELS)),
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4]),
    expert=st.sampled_from([1, 2, 16]),
    first=st.sampled_from([0, 1, 3]),
)
def test_the_shards_of_a_layout_make_up_the_whole(name, tensor, pipeline, expert, first):
    dimensions = KNOWN_MODELS[name]
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        expert=expert if dimensions.experts else 1,
        sequence=tensor > 1,
        first_stage_layers=first if pipeline > 1 else 0,
    )
    if layout_fault(dimensions, parallel, 16 * pipeline * tensor):
        return
    stages = [stage_parameters(dimensions, parallel, stage) for stage in range(pipeline)]
    held = sum(stage.split * tensor + stage.replicated + stage.experts * parallel.expert for stage in stages)
    embeddings = 1 if dimensions.tied else 2
    padding = embeddings * (dimensions.padded_vocab(tensor) - dimensions.vocab) * dimensions.hidden
    second_copy = (
        dimensions.padded_vocab(tensor) * dimensions.hidden if dimensions.tied and pipeline > 1 else 0
    )
    assert held == checkpoint_parameters(dimensions) + padding + second_copy


@given(vocab=st.integers(1, 300_000), tensor=st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
def test_the_vocabulary_is_padded_as_the_model_pads_it(vocab, tensor):
    dimensions = ModelDimensions(
        architecture="llama",
        hidden=1,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=1,
        ffn=1,
        vocab=vocab,
        tied=False,
    )
    assert dimensions.padded_vocab(tensor) == transformer_config.padded_vocab_size(vocab, tensor)


def test_a_layer_of_llama_8b_by_hand():
    # q, o of 4096 x 4096; k, v of 4096 x 1024; three matrices of 4096 x 14336; two norms
    expected = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert layer_parameters(KNOWN_MODELS["llama-3.1-8b"], 1).total == expected


def test_a_layer_of_qwen3_30b_a3b_by_hand():
    # q, o of 2048 x 4096; k, v of 2048 x 512; router of 128 x 2048; norms of the layer, q and k; 16 of 128 experts on
    # a rank
    held = layer_parameters(KNOWN_MODELS["qwen3-30b-a3b"], 2, 8)
    assert held.split == (2 * 2048 * 4096 + 2 * 2048 * 512) // 2
    assert held.replicated == 128 * 2048 + 2 * 2048 + 2 * 128
    assert held.experts == 16 * 3 * 2048 * 768
