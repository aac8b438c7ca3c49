"""The chosen share of the GPU and size of the cache for an engine whose configuration sets neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.config.load import load_config
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import KNOWN_MODELS
from a2tgpo.plan.engine import engine_memory
from a2tgpo.plan.engine_share import SAFETY_MARGIN, with_engine_share
from a2tgpo.plan.hardware import GIB, GPUS
from a2tgpo.plan.plan import make_plan
from a2tgpo.rollout import engine_share

ROOT = Path(__file__).parents[3]
H100 = GPUS["h100-80gb"]
FP8 = str(ROOT / "configs/precision/fp8.yaml")
MODELS = {
    "train_70b": "qwen2.5-72b",
    "train_70b_llama": "llama-3.3-70b",
    "train_30b_a3b": "qwen3-30b-a3b",
    "train_8b": "qwen3-8b",
    "train_4b": "qwen3-4b",
}


def load(name, *overrides):
    return load_config(ROOT / f"configs/{name}.yaml", overrides)


def chosen(name, *overrides, gpu=H100, gpus=None, **more):
    config = load(name, *overrides)
    dimensions = KNOWN_MODELS[MODELS[name]]
    return with_engine_share(config, dimensions, gpu, gpus=gpus or config.cluster.gpus, **more).rollout


@pytest.mark.parametrize(
    "overrides", [(), (FP8,), ("update.offload=false",)], ids=["bf16", "fp8", "resident"]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_chosen_share_leaves_the_margin_and_no_larger_cache_would(name, overrides):
    config, dimensions = load(name, *overrides), KNOWN_MODELS[MODELS[name]]
    plan = make_plan(config, dimensions, H100, gpus=config.cluster.gpus)

    def least(cache):
        fixed = make_plan(
            load(name, *overrides, f"rollout.kv_cache_gib={cache}"),
            dimensions,
            H100,
            gpus=config.cluster.gpus,
        )
        return min(phase.headroom for phase in fixed.phases if phase.name in ("start", "rollout"))

    cache = plan.config.rollout.kv_cache_gib
    assert plan.share_is_chosen and least(cache) >= SAFETY_MARGIN - 0.002  # the share is rounded up to 0.001
    fills = plan.geometry.full_sequences >= max(256, plan.geometry.trajectories_per_engine)
    assert fills or least(cache + 0.5) < SAFETY_MARGIN


@pytest.mark.parametrize("name", MODELS)
def test_the_chosen_cache_holds_what_a_preset_decodes_at_once(name):
    config = load(name)
    plan = make_plan(config, KNOWN_MODELS[MODELS[name]], H100, gpus=config.cluster.gpus)
    assert config.rollout.kv_cache_gib == config.rollout.gpu_memory_fraction == 0
    assert plan.geometry.concurrent == min(
        config.rollout.max_concurrent, plan.geometry.trajectories_per_engine
    )
    assert plan.geometry.full_sequences >= 45


def test_what_the_configuration_sets_stays():
    config, dimensions = load("train_70b", "rollout.gpu_memory_fraction=0.5"), KNOWN_MODELS["qwen2.5-72b"]
    assert with_engine_share(config, dimensions, H100, gpus=64) is config
    assert not make_plan(config, dimensions, H100, gpus=64).share_is_chosen
    fixed = with_engine_share(
        load("train_70b", "rollout.kv_cache_gib=20"), dimensions, H100, gpus=64, assumed=Assumptions()
    )
    assert fixed.rollout.kv_cache_gib == 20
    share = engine_memory(fixed, dimensions, H100).total / (H100.memory_gib * GIB)
    assert share <= fixed.rollout.gpu_memory_fraction <= share + 0.001


def test_a_cache_is_no_larger_than_the_sequences_in_flight_can_fill():
    few = ("rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.max_concurrent=4")
    # Each of 8 engines has 2 of the 16 trajectories, so 4 places suffice. With 8,256 tokens each, keys and values of
    # 36 layers with 8 heads of 128 take 4.54 GiB.
    assert chosen("train_4b", *few).kv_cache_gib == 5.0


def test_a_card_without_room_gets_a_cache_of_one_sequence_and_does_not_fit():
    small = dataclasses.replace(H100, memory_gib=20.0)
    plan = make_plan(load("train_70b"), KNOWN_MODELS["qwen2.5-72b"], small, gpus=64)
    assert plan.holds_a_sequence and not plan.fits and plan.config.rollout.kv_cache_gib == 0.5


@settings(max_examples=20)
@given(smaller=st.floats(25, 180), larger=st.floats(25, 180))
def test_a_larger_card_never_gets_a_smaller_cache(smaller, larger):
    small, large = (
        chosen("train_8b", gpu=dataclasses.replace(H100, memory_gib=gib)).kv_cache_gib
        for gib in sorted((smaller, larger))
    )
    assert small <= large


def test_all_ranks_take_the_share_of_the_smallest_card(monkeypatch):
    config = load("train_8b", f"model.path={ROOT}/models/Qwen3-8B")

    def settled(own_gib, all_gib):
        card = SimpleNamespace(total_memory=own_gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        monkeypatch.setattr(engine_share, "all_gather_object", lambda *_: [gib * GIB for gib in all_gib])
        monkeypatch.setattr(engine_share.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(engine_share.dist, "group", SimpleNamespace(WORLD=object()))
        return engine_share.settle_engine_share(config).rollout

    assert engine_share.settle_engine_share(config) is config, "no GPU is seen: nothing is chosen"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sizes = [79.1] * 7 + [75.0]
    assert settled(79.1, sizes) == settled(75.0, sizes)
    assert settled(79.1, [79.1] * 8) == chosen("train_8b") != settled(79.1, sizes)
