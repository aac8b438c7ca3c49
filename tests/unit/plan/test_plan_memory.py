"""Memory by phase: values by hand, properties, and the shipped configurations on the GPUs they are meant for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from test_plan_parameters import gpt_models, hf_config_of, in_place_of

from a2tgpo.config.cluster import GpuKind
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.load import load_config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.config.update import ExtrapolationConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.memory import residency
from a2tgpo.model.forward import forward_packed
from a2tgpo.plan.activations import MicrobatchShape
from a2tgpo.plan.advice import faults
from a2tgpo.plan.dimensions import KNOWN_MODELS, model_dimensions
from a2tgpo.plan.engine import engine_memory, engine_weight_bytes, kv_bytes_per_token
from a2tgpo.plan.hardware import GIB, GPUS
from a2tgpo.plan.host_memory import PROCESS_GIB
from a2tgpo.plan.layouts import LEAST_HEADROOM
from a2tgpo.plan.memory import PHASES, chunks_in_flight, trainer_memory
from a2tgpo.plan.plan import Plan, make_plan
from a2tgpo.plan.report import plan_text
from a2tgpo.plan.transfers import transfer_bytes

ROOT = Path(__file__).parents[3]
H100 = GPUS["h100-80gb"]
QWEN_72B = KNOWN_MODELS["qwen2.5-72b"]
FP8 = str(ROOT / "configs/precision/fp8.yaml")
CONFIG_70B = load_config(ROOT / "configs/train_70b.yaml")

CONFIG_70B_ON_16 = load_config(ROOT / "configs/train_70b_lora.yaml", ["model.lora.rank=0"])
CONFIGS = {path.stem: load_config(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}
MEANT_FOR = {
    "train_70b": ("qwen2.5-72b", 64),
    "train_70b_llama": ("llama-3.3-70b", 64),
    "train_70b_lora": ("qwen2.5-72b", 16),
    "train_30b_a3b": ("qwen3-30b-a3b", 16),
    "train_8b": ("qwen3-8b", 8),
    "train_4b": ("qwen3-4b", 8),
}
"""Model and number of GPUs for each configuration file."""
LARGER_THAN_CPU_MODELS = "qwen2.5-0.5b"


def changed(config: RunConfig, section: str, **values) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def plan_70b(config: RunConfig) -> Plan:
    return make_plan(config, QWEN_72B, H100, gpus=64)


def peaks(plan: Plan) -> dict[str, float]:
    return {phase.name: phase.peak for phase in plan.phases}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_fits_80_gb_with_room_left(name):
    config = CONFIGS[name]
    known = None if name.startswith("train_") else LARGER_THAN_CPU_MODELS
    dimensions, _ = model_dimensions(config.model.path, known)
    if known is None:
        assert (dimensions, config.cluster.gpus) == (KNOWN_MODELS[MEANT_FOR[name][0]], MEANT_FOR[name][1])
    plan = make_plan(config, dimensions, GPUS[config.cluster.gpu], gpus=config.cluster.gpus)
    assert plan.fits and plan.gpu == H100
    assert [phase.name for phase in plan.phases if phase.headroom < LEAST_HEADROOM] == []


@pytest.mark.parametrize("name", ["train_70b", "train_70b_llama"])
def test_the_large_models_compute_in_bfloat16_and_one_file_puts_them_into_fp8(name):
    config = load_config(ROOT / f"configs/{name}.yaml", [FP8])
    assert (config.model.fp8.format, config.model.fp8.recipe) == ("e4m3", "blockwise")
    assert config.rollout.quantization != "none" and config.algorithm.correction.kind == "truncate"
    off = CONFIGS[name]
    assert (off.model.fp8, off.rollout.quantization) == (Fp8Config(), "none")
    assert off.algorithm.correction.kind == "none"
    for planned in (off, config):
        plan = make_plan(planned, KNOWN_MODELS[MEANT_FOR[name][0]], H100, gpus=64)
        assert min(phase.headroom for phase in plan.phases) >= LEAST_HEADROOM


def test_a_restart_of_72b_reads_its_checkpoint_once_and_no_other_weights():
    """A restart reads 14 bytes per parameter. It reads the files of model.path only for a reference or a quantised
    engine.
    """
    assert plan_70b(CONFIG_70B).restart_bytes == 14 * 72_706_203_648 < 1.3e12
    reference = plan_70b(changed(CONFIG_70B, "algorithm", kl_coef=1e-3))
    assert reference.restart_bytes == (14 + 8 * 2) * 72_706_203_648
    quantised = plan_70b(load_config(ROOT / "configs/train_70b.yaml", [FP8]))
    assert quantised.restart_bytes == (14 + 8 * 2) * 72_706_203_648


def test_checkpoints_of_72b_are_counted_whole_and_weights_within_their_gigabytes():
    def kept(**settings):
        config = changed(CONFIG_70B, "run", steps=1000)
        config = changed(config, "evaluation", every=20)
        return plan_70b(changed(config, "checkpoint", every=20, keep=2, **settings)).kept_bytes

    assert kept(best_by="none") == 3 * 14 * 72_706_203_648
    assert kept() == (3 * 14 + 2) * 72_706_203_648
    assert kept(keep_every=100) == (3 * 14 + 2 * (1 + 9)) * 72_706_203_648
    assert kept(keep_every=100, keep_gb=500.0) == 3 * 14 * 72_706_203_648 + 500e9
    assert kept(keep_gb=1.0) == kept(), "the best is never removed"


def test_adapters_of_72b_in_a_plan_by_hand():
    config = CONFIGS["train_70b_lora"]
    # Rank x (inputs + outputs): q and o 2 x 8192; k and v 8192 + 1024; gate, up and down 8192 + 29568; 80 layers
    adapters = 80 * 32 * (2 * 2 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 29568))
    plan = make_plan(config, QWEN_72B, H100, gpus=16)
    # Weights in bfloat16 for the run and for PEFT, float32 masters and two moments.
    assert plan.checkpoint_bytes == (2 + 2 + 12) * adapters == 16 * 421_068_800
    # Both nodes read the files of model.path, and all read the checkpoint once.
    assert plan.restart_bytes == plan.checkpoint_bytes + 2 * 2 * 72_706_203_648
    reference = changed(config, "algorithm", kl_coef=1e-3)
    assert make_plan(reference, QWEN_72B, H100, gpus=16).phases == plan.phases
    # On a rank of 4 tensor-parallel and 2 pipeline ranks, A of q, k, v, gate, up and B of o, down are whole.
    layer = 5 * 8192 + 2 * 8192 + (8192 + 2 * 1024 + 2 * 29568 + 8192 + 29568) // 4
    trained = 40 * 32 * layer
    memory = trainer_memory(config, QWEN_72B, stage=0, data_parallel=2)
    full = trainer_memory(CONFIG_70B_ON_16, QWEN_72B, stage=0, data_parallel=2)
    assert (memory.gradients, memory.moments, memory.master_weights, memory.reference) == (
        4 * trained,
        4 * trained,
        2 * trained,
        0,
    )
    assert memory.weights == full.weights + 2 * trained


def test_adapters_that_a_mixture_of_experts_cannot_have_are_refused_in_one_line():
    config = load_config(
        ROOT / "configs/train_30b_a3b.yaml", ["model.lora.rank=8", "model.lora.targets=[up_proj]"]
    )
    with pytest.raises(ConfigError, match="projections in experts, which get no adapters"):
        make_plan(config, KNOWN_MODELS["qwen3-30b-a3b"], H100, gpus=16)


def test_an_update_of_adapters_computes_no_gradients_of_frozen_weights():
    plan = make_plan(CONFIGS["train_70b_lora"], QWEN_72B, H100, gpus=16)
    full = make_plan(CONFIG_70B_ON_16, QWEN_72B, H100, gpus=16)
    assert plan.update.compute / full.update.compute == pytest.approx(2 / 3, rel=0.05)
    assert plan.stage_flops["update"] / full.stage_flops["update"] == pytest.approx(2 / 3, rel=0.05)
    assert plan.update.data < full.update.data / 50
    assert plan.update.optimizer < full.update.optimizer / 20
    assert plan.score.compute == pytest.approx(full.score.compute, rel=0.01)


def test_fp8_in_a_plan_by_hand():
    config = changed(
        CONFIG_70B, "model", fp8=Fp8Config(format="e4m3", first_layers_bf16=1, last_layers_bf16=2)
    )
    # Matrices over 8 ranks: q, o of 8192 x 8192; k, v of 8192 x 1024; three of 8192 x 29568. No biases, no norms.
    linear = (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568) // 8
    copies = [trainer_memory(config, QWEN_72B, stage=s, data_parallel=2).fp8_copies for s in range(4)]
    # Each weight has two copies of one byte, and each block of 128 x 128 weights a float32 scale per copy.
    assert copies == [2 * (1 + 4 / 128**2) * layers * linear for layers in (19, 20, 20, 18)]
    whole = MicrobatchShape(dimensions=QWEN_72B, parallel=config.parallel, tokens=8192, element_bytes=2)
    fp8 = dataclasses.replace(whole, fp8_bytes=1.0)
    # The outputs of two norms and the gated product lose one byte per value. Attention's output gains a copy.
    assert whole.layer_bytes - fp8.layer_bytes == 1024 * (2 * 8192 + 29568 - 8192)
    assert fp8.saved_layer_bytes("full") == whole.saved_layer_bytes("full")
    quantised = engine_weight_bytes(load_config(ROOT / "configs/train_70b.yaml", [FP8]), QWEN_72B)
    plain = engine_weight_bytes(CONFIG_70B, QWEN_72B)
    assert plain - quantised == pytest.approx(80 * linear * (1 - 4 / 128**2))


@pytest.mark.parametrize(
    ("overrides", "card", "message"),
    [
        (
            ["rollout.quantization=fp8"],
            "h100-80gb",
            "allowed: none | fp8_per_channel, since a rank of the engine",
        ),
        (
            ["model.fp8.recipe=mxfp8"],
            "h100-80gb",
            "'mxfp8'; allowed on h100-80gb: recipe tensorwise | blockwise",
        ),
        (["model.fp8.recipe=mxfp8"], "b200-180gb", "3696 feed-forward channels"),
        ([], "a100-80gb", "model.fp8.recipe is 'blockwise'; allowed on a100-80gb: model.fp8.format none"),
        (["model.fp8.first_layers_bf16=21"], "h100-80gb", "first_layers_bf16 is 21; allowed: at most 20"),
    ],
)
def test_fp8_that_card_model_or_layout_does_not_allow_is_refused_in_one_line(overrides, card, message):
    config = load_config(ROOT / "configs/train_70b.yaml", [FP8, *overrides])
    with pytest.raises(ConfigError) as refused:
        make_plan(config, QWEN_72B, GPUS[card], gpus=64)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_every_kind_of_card_that_a_configuration_may_name_is_known():
    assert set(get_args(GpuKind)) == set(GPUS)


@pytest.mark.parametrize("name", MEANT_FOR)
def test_the_shipped_configurations_have_the_papers_settings(name):
    config = CONFIGS[name]
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (64, 16)
    lr = 1e-5 if config.model.lora.enabled else 1e-6
    assert (config.update.prompts_per_minibatch, config.update.lr) == (8, lr)
    assert (config.update.lr_schedule, config.update.weight_decay, config.update.clip_grad) == (
        "constant",
        0.01,
        1.0,
    )
    assert (config.update.adam_beta1, config.update.adam_beta2) == (0.9, 0.999)
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (2000, 6192)
    assert (config.rollout.max_turns, config.algorithm.kl_coef) == (6, 0.0)
    assert config.algorithm.advantage == "turn_group"


def test_trainer_state_of_a_data_parallel_rank_by_hand(config_8b):
    # Two tensor-parallel ranks share 8,190,735,360 parameters, but both have the norms. The vocabulary of 151,936
    # needs no padding, because it is a multiple of 128.
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    parameters = (8_190_735_360 - norms) / 2 + norms
    held = trainer_memory(config_8b, KNOWN_MODELS["qwen3-8b"], stage=0, data_parallel=4)
    assert held.weights == 2 * parameters
    assert held.gradients == 4 * parameters
    assert held.master_weights == 4 * parameters / 4
    assert held.moments == 8 * parameters / 4
    assert held.reference == 0


def test_the_engine_takes_the_share_it_is_given(config_8b):
    config_8b = changed(config_8b, "rollout", gpu_memory_fraction=0.6)
    engine = engine_memory(config_8b, KNOWN_MODELS["qwen3-8b"], H100)
    assert engine.total == pytest.approx(config_8b.rollout.gpu_memory_fraction * H100.memory_gib * GIB)
    # 36 layers, 4 of 8 key-value heads of 128, keys and values, 2 bytes
    assert kv_bytes_per_token(config_8b, KNOWN_MODELS["qwen3-8b"]) == 2 * 36 * 4 * 128 * 2
    assert engine_weight_bytes(config_8b, KNOWN_MODELS["qwen3-8b"]) == pytest.approx(8.19e9, rel=0.01)


def test_a_reference_costs_its_weights_while_it_scores_and_without_offload_always(config_8b):
    config_8b = changed(config_8b, "rollout", gpu_memory_fraction=0.6)
    resident = changed(config_8b, "update", offload=False)
    assert _cost_of_a_reference(config_8b) == pytest.approx({name: float(name == "score") for name in PHASES})
    assert _cost_of_a_reference(resident) == pytest.approx(dict.fromkeys(PHASES, 1.0))


def test_extrapolation_costs_two_more_passes_and_16_bytes_a_weight_on_the_host():
    plain = plan_70b(CONFIG_70B)
    extrapolation = ExtrapolationConfig(horizon=5)
    extrapolated = plan_70b(changed(CONFIG_70B, "update", extrapolation=extrapolation))
    assert extrapolated.update.seconds == pytest.approx(3 * plain.update.seconds)
    assert extrapolated.stage_flops["update"] == 3 * plain.stage_flops["update"]
    assert peaks(extrapolated) == peaks(plain)
    stepped = (
        trainer_memory(CONFIG_70B, QWEN_72B, stage=3, data_parallel=2).weights / 2 / 2
    )  # over two replicas
    copies = extrapolated.host.total - plain.host.total
    assert copies == extrapolated.host.before_update == 8 * 16 * stepped
    copied = transfer_bytes(extrapolated) - transfer_bytes(plain)
    assert copied == pytest.approx(2 * 16 * stepped * plain.geometry.optimizer_steps)
    small = make_plan(
        extrapolated.given_config, QWEN_72B, dataclasses.replace(H100, host_memory_gib=400), gpus=64
    )
    assert "for what precedes an extrapolated update" in faults(small)[0]
    assert "set update.extrapolation.horizon=0" in faults(small)[0]


def _cost_of_a_reference(config_8b: RunConfig) -> dict[str, float]:
    """Return how much memory a reference adds to each phase, as a multiple of a rank's weights."""
    with_reference = changed(config_8b, "algorithm", kl_coef=1e-3)
    dimensions = KNOWN_MODELS["qwen3-8b"]
    weights = trainer_memory(with_reference, dimensions, stage=0, data_parallel=4).weights
    before = peaks(make_plan(config_8b, dimensions, H100, gpus=8))
    after = peaks(make_plan(with_reference, dimensions, H100, gpus=8))
    return {name: (after[name] - peak) / (1.03 * weights) for name, peak in before.items()}


def test_a_node_has_room_for_what_leaves_its_cards_and_a_checkpoint_beside_it():
    held = trainer_memory(CONFIG_70B, QWEN_72B, stage=3, data_parallel=2)
    # The two nodes of the last stage need the most. Two replicas share 12 bytes of optimizer state, and for a
    # checkpoint also 2 bytes of weights.
    parameters = held.weights / 2
    host = plan_70b(CONFIG_70B).host
    assert host.offloaded == 8 * parameters * (2 + 12 / 2)
    assert host.saving == 8 * parameters * (2 + 12) / 2
    assert host.loading == 8 * 2 * 152_064 * 8192 * 2  # embeddings, as read and cut
    assert host.total == host.offloaded + host.saving + 8 * PROCESS_GIB * GIB
    stays = plan_70b(changed(CONFIG_70B, "update", offload=False)).host
    assert (stays.offloaded, stays.saving) == (0, host.saving)
    small = make_plan(CONFIG_70B, QWEN_72B, dataclasses.replace(H100, host_memory_gib=290), gpus=64)
    assert not small.fits
    assert faults(small) == [
        "host: 295 GiB of a node's memory are needed (140 for what leaves the cards, 123 for a checkpoint being "
        "written, 32 for processes), but the node has 290 GiB; set update.offload=false, raise parallel.tensor, or "
        "use more nodes"
    ]


def test_rows_of_experts_take_384_bytes_a_token_of_qwen3_30b_a3b_on_the_host():
    config, dimensions = CONFIGS["train_30b_a3b"], KNOWN_MODELS["qwen3-30b-a3b"]
    plan = make_plan(config, dimensions, H100, gpus=16)
    tokens = 64 * 16 * 2000
    # Each of a node's 8 ranks holds its replica's quarter twice. Each of its 2 engines holds the rows of what it
    # played, and of its cache.
    expected = 384 * (8 * 2 * tokens / 4 + 2 * (tokens / 4 + plan.geometry.kv_tokens))
    assert plan.host.experts == pytest.approx(expected) and 3e9 < expected < 10e9
    assert plan.host.total == plan.host.offloaded + plan.host.saving + expected + 8 * PROCESS_GIB * GIB
    assert "experts of the step's tokens" in plan_text(plan, source="built in")
    plain = make_plan(changed(config, "rollout", router_replay=False), dimensions, H100, gpus=16)
    assert plain.host.experts == 0 and "experts of" not in plan_text(plain, source="built in")


def test_a_rank_writes_the_state_that_it_owns_whoever_holds_the_rest(config_8b):
    dimensions = KNOWN_MODELS["qwen3-8b"]
    sharded, whole = (
        make_plan(changed(config_8b, "update", distributed_optimizer=how), dimensions, H100, gpus=8).host
        for how in (True, False)
    )
    assert sharded.saving == whole.saving == pytest.approx(14 * 8_190_735_360, rel=1e-3)
    assert sharded.offloaded < whole.offloaded
    float32 = make_plan(changed(config_8b, "model", dtype="float32"), dimensions, H100, gpus=8).host
    assert float32.saving == pytest.approx(12 * 8_190_735_360, rel=1e-3)


def test_the_plan_has_on_the_card_what_the_run_has():
    config = changed(CONFIG_70B, "algorithm", kl_coef=1e-3)
    parts = {
        "trainer weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "reference": "reference",
        "engine weights": "engine weights",
        "KV cache": "KV cache",
    }
    for phase in plan_70b(config).phases:
        held = {parts[name] for name in phase.parts if name in parts}
        expected = (
            {"engine's share"} if phase.name == "start" else residency.resident(phase.name, offload=True)
        )
        assert held == expected or (phase.name == "start" and not held), phase.name


def test_the_first_stage_of_a_pipeline_keeps_as_many_microbatches_as_stages():
    plan = plan_70b(changed(CONFIG_70B, "model", recompute="full"))
    update = next(phase for phase in plan.phases if phase.name == "update")
    assert plan.geometry.microbatches >= 4
    # 20 layers, 4 micro-batches in flight, 8192 tokens over 8 ranks, 8192 channels of 2 bytes
    assert update.parts["activations"] == 20 * 4 * 8192 // 8 * 8192 * 2
    assert update.stage == 0


@given(
    pipeline=st.integers(2, 8),
    virtual=st.integers(1, 4),
    microbatches=st.integers(1, 40),
    data=st.data(),
)
def test_chunks_in_flight_are_those_of_megatrons_schedule(pipeline, virtual, microbatches, data):
    stage = data.draw(st.integers(0, pipeline - 1))
    parallel = ParallelConfig(pipeline=pipeline, virtual=virtual)
    count = microbatches + (-microbatches % pipeline if virtual > 1 else 0)
    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: stage)
    communicator = SimpleNamespace(
        pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
    )
    total, _, warmup, _ = get_pp_rank_microbatches(count, virtual, pipeline, p2p_communicator=communicator)
    assert chunks_in_flight(parallel, stage, microbatches) == min(total, warmup + 1)


def test_virtual_uneven_and_context_layouts_change_an_updates_activations_as_counted():
    def activations(**layout):
        config = changed(changed(CONFIG_70B, "model", recompute="full"), "parallel", **layout)
        return next(phase for phase in plan_70b(config).phases if phase.name == "update").parts["activations"]

    one = 8192 // 8 * 8192 * 2  # one layer: 8192 tokens over 8 ranks, 8192 channels of 2 bytes
    assert activations() == 20 * 4 * one
    # With half the activations, the last stage needs the most memory, because it has the head. It keeps one
    # micro-batch.
    assert activations(context=2) == 20 * one / 2
    # The last stage needs the most here too. Its last chunk has started one micro-batch, and its other chunks four
    # each.
    assert activations(virtual=4) == 5 * (3 * 4 + 1) * one
    assert activations(first_stage_layers=17) == 21 * one  # the other 63 layers on three stages


@given(
    tokens=st.tuples(st.integers(8192, 100_000), st.integers(0, 100_000)),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_more_tokens_never_need_less(tokens, recompute):
    least, more = tokens
    config = changed(CONFIG_70B, "model", recompute=recompute)
    small = plan_70b(changed(config, "update", max_microbatch_tokens=least))
    large = plan_70b(changed(config, "update", max_microbatch_tokens=least + more))
    shape = MicrobatchShape(dimensions=QWEN_72B, parallel=config.parallel, tokens=least, element_bytes=2)
    wider = dataclasses.replace(shape, tokens=least + more)
    assert wider.layer_bytes >= shape.layer_bytes
    assert wider.logit_bytes(with_gradient=True) >= shape.logit_bytes(with_gradient=True)
    assert peaks(large)["score"] >= peaks(small)["score"]
    assert peaks(large)["rollout"] == peaks(small)["rollout"]


@given(pipeline=st.sampled_from([1, 2, 4, 8]), tensor=st.sampled_from([1, 2, 4]))
def test_more_shards_never_hold_more(pipeline, tensor):
    config = changed(CONFIG_70B, "parallel", tensor=tensor, pipeline=pipeline, sequence=tensor > 1)
    wider = changed(config, "parallel", tensor=2 * tensor, sequence=True)
    for stage in range(pipeline):
        narrow = trainer_memory(config, QWEN_72B, stage=stage, data_parallel=1)
        half = trainer_memory(wider, QWEN_72B, stage=stage, data_parallel=1)
        assert half.weights < narrow.weights
        assert half.gradients < narrow.gradients


@given(tensor=st.sampled_from([2, 4, 8]), tokens=st.integers(1, 100_000))
def test_recomputation_and_sequence_parallelism_save(tensor, tokens):
    plain = MicrobatchShape(
        dimensions=QWEN_72B, parallel=ParallelConfig(tensor=tensor), tokens=tokens, element_bytes=2
    )
    cut = dataclasses.replace(plain, parallel=ParallelConfig(tensor=tensor, sequence=True))
    assert cut.layer_bytes <= plain.layer_bytes
    for shape in (plain, cut):
        kept = [shape.saved_layer_bytes(recompute) for recompute in ("full", "selective", "none")]
        assert kept == sorted(kept)


def test_activations_of_a_layer_of_llama_8b_by_hand():
    shape = MicrobatchShape(
        dimensions=KNOWN_MODELS["llama-3.1-8b"],
        parallel=ParallelConfig(tensor=2, sequence=True),
        tokens=1000,
        element_bytes=2,
    )
    norms = 4 * 4096  # two, input and output
    attention = 4096 + 2 * 1024 + 4096 + 1024 + 4096  # q, k, v; rotated q and k; output
    feed_forward = 3 * 14336
    normalisers = 32 * 4  # bytes
    assert shape.layer_bytes == 500 * (2 * (norms + attention + feed_forward) + normalisers)
    assert shape.saved_layer_bytes("full") == 500 * 2 * 4096
    # A rank has 64128 rows of the padded vocabulary: bfloat16 logits with their gradient, and float32 chunks of 512
    # tokens.
    logits = 2 * 1000 * 64128 * 2 + 4 * 512 * 64128 * 4
    assert shape.logit_bytes(with_gradient=True) == logits + 2 * 500 * 4096 * 2 + 1000 * 4096 * 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_saved_activations_against_what_autograd_saves(architecture):
    # The CPU twin's kernels are not fused. Without recomputation it keeps the planned bytes and also intermediate
    # results that Transformer Engine's kernels never write. With full recomputation there are no such results.
    full, planned_full = _saved_bytes_per_layer(architecture, "full")
    assert full == planned_full
    none, planned_none = _saved_bytes_per_layer(architecture, "none")
    assert 1.45 <= none / planned_none <= (1.8 if architecture == "qwen3_moe" else 1.7)


def _saved_bytes_per_layer(architecture: str, recompute: str) -> tuple[float, int]:
    """Return the bytes that autograd keeps for a layer of a small model, and the planned bytes. The former are half
    the difference between four layers and two.
    """
    tokens, parallel, totals = 64, ParallelConfig(), []
    for layers in (2, 4):
        dimensions = dataclasses.replace(
            KNOWN_MODELS["qwen2.5-0.5b"],
            architecture=architecture,
            hidden=128,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_dim=32,
            ffn=384,
            vocab=256,
            tied=False,
            experts=8 if architecture == "qwen3_moe" else 0,
            experts_per_token=2 if architecture == "qwen3_moe" else 1,
        )
        model = ModelConfig(path="small", dtype="float32", recompute=recompute)
        with in_place_of(0, 1, parallel) as groups:
            (gpt,) = gpt_models(hf_config_of(dimensions), model, parallel, groups)
            for parameter in gpt.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
            saved: dict[int, torch.Tensor] = {}

            def keep(
                tensor: torch.Tensor,
                weights: set[int] = weights,
                saved: dict[int, torch.Tensor] = saved,
            ) -> torch.Tensor:
                if tensor.untyped_storage().data_ptr() not in weights:
                    saved[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = forward_packed(
                    gpt,
                    torch.zeros(1, tokens, dtype=torch.int64),
                    torch.arange(tokens)[None],
                    torch.tensor([0, tokens]),
                )
            totals.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
            del output
    shape = MicrobatchShape(dimensions=dimensions, parallel=parallel, tokens=tokens, element_bytes=4)
    return (totals[1] - totals[0]) / 2, shape.saved_layer_bytes(recompute)


@pytest.mark.parametrize(
    ("section", "values", "phase", "change"),
    [
        ("parallel", {"pipeline": 1}, "update", "set model.recompute=full"),
        ("update", {"max_microbatch_tokens": 65536}, "update", "set model.recompute=full"),
        ("rollout", {"kv_cache_gib": 60.0}, "rollout", "set rollout.kv_cache_gib=52.5"),
        ("rollout", {"gpu_memory_fraction": 0.95}, "start", "set rollout.gpu_memory_fraction=0.9"),
    ],
)
def test_what_does_not_fit_is_named_with_a_change_that_mends_it(section, values, phase, change):
    plan = plan_70b(changed(CONFIG_70B, section, **values))
    assert not plan.fits
    (line,) = [fault for fault in faults(plan) if fault.startswith(f"{phase}:")]
    assert line.endswith(change)
    key, value = change.removeprefix("set ").split("=")
    overrides = [f"{section}.{name}={value}" for name, value in values.items()] + [f"{key}={value}"]
    assert plan_70b(load_config(ROOT / "configs/train_70b.yaml", overrides)).fits


def test_an_engine_too_small_for_one_sequence_is_refused():
    plan = plan_70b(changed(CONFIG_70B, "rollout", kv_cache_gib=0.0, gpu_memory_fraction=0.2))
    assert not plan.fits
    assert any("less than one sequence of 8256" in fault for fault in faults(plan))


def test_what_no_setting_mends_is_said():
    plan = make_plan(changed(CONFIG_70B, "parallel", tensor=8, pipeline=1), QWEN_72B, H100, gpus=8)
    assert any("no single setting is enough" in fault for fault in faults(plan))


def test_a_refit_holds_two_buckets_and_the_parameter_being_made():
    embedding, gate_up = (
        152_064 * 8192 * 2,
        2 * 29_568 * 8192 * 2,
    )  # bytes; the buckets of 256 MiB are smaller
    stages_brought = 1 + 1 / 8  # all eight shards, plus the one being broadcast

    def refit_buckets(config):
        return [phase.parts["refit buckets"] for phase in plan_70b(config).phases if phase.name == "refit"]

    by_hand = (embedding + gate_up) * stages_brought + embedding
    assert refit_buckets(CONFIG_70B) == [pytest.approx(by_hand)]
    larger = changed(CONFIG_70B, "refit", bucket_mib=4096)
    assert refit_buckets(larger) == [pytest.approx(2 * 4 * GIB * stages_brought + embedding)]
